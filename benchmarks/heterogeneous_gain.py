"""Predicts what an encoder on a rank of its own gained, where that is published.

Qwen3.5-VL-27B, fine-tuned in bf16: the best homogeneous layout, TP4 PP2 DP2 on 16 GPUs with the
vision encoder inside the first stage and split as the language model is, against the same for the
language model alone and the encoder on a 17th GPU. The source states no GPU.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from benchmarks.predictions import joined
from benchmarks.published_points import POINTS, read_points
from megatron_mosaic.cluster.shipped import load_cluster
from megatron_mosaic.cost.cost_model import CostModel
from megatron_mosaic.cost.costs import ModuleInStep
from megatron_mosaic.cost.sizes import ParallelSizes, TrainingSettings
from megatron_mosaic.cost.step import step_breakdown
from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.plan import Plan, ScheduleChoice
from megatron_mosaic.model.shipped import load_model
from megatron_mosaic.model.spec import LanguageHead, ModelSpec
from megatron_mosaic.model.tokens import Distribution

STATED_GPU = "h100"
"""The source's launch script asks for nodes of 8 GPUs and its recipes are tuned for this one."""

PLAUSIBLE_GPUS = ("a100-80g", "h100", "h200", "b200", "gb200-nvl72")

# Patches of 16*16 pixels of an image. RDR's are 768*768 (the source); CORD-v2's receipts and
# MedPix' scans vary: their usual sizes, 864*1296 and 512*512, stand for them.
_PATCHES: Mapping[str, int] = {"CORD-v2": 54 * 81, "RDR": 48 * 48, "MedPix": 32 * 32}

_LANGUAGE = ParallelSizes(tp=4, pp=2, dp=2, sequence_parallel=True)
_BATCH = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain:
    """Published and predicted shortening of a step.

    Args:
        dataset: Images.
        sequence_length: Tokens of a sample.
        published: Share of the homogeneous step that is saved.
        predicted: The same by GPU.
    """

    dataset: str
    sequence_length: int
    published: float
    predicted: Mapping[str, float]


def gains() -> Iterator[Gain]:
    """Yields every published cell beside its predictions."""
    for point in read_points(POINTS):
        if point.fields["metric"] != "wall_step_time_reduction_pct_vs_homog":
            continue
        dataset = next(name for name in _PATCHES if name in point.fields["model"])
        length = point.whole("seq_len") or 0
        model = fine_tuned_model(sequence_length=length, patches=_PATCHES[dataset])
        yield Gain(
            dataset=dataset,
            sequence_length=length,
            published=float(point.fields["value"]) / 100,
            predicted={gpu: predicted_gain(model, gpu) for gpu in PLAUSIBLE_GPUS},
        )


def fine_tuned_model(*, sequence_length: int, patches: int) -> ModelSpec:
    """The model as the tutorial trains it: one image a sample, no multi-token prediction."""
    model = load_model("qwen3.5-27b")
    head = model.language.output
    assert isinstance(head, LanguageHead)
    language = replace(
        model.language,
        tokens_per_item=Distribution.constant(float(sequence_length)),
        output=replace(head, mtp_layers=0),
    )
    vision = replace(
        model.modules["vision"],
        items_per_sample=Distribution.constant(1.0),
        tokens_per_item=Distribution.constant(float(patches)),
    )
    return replace(model, modules={"vision": vision, "language": language})


def predicted_gain(model: ModelSpec, gpu: str) -> float:
    """Share of the homogeneous step that the encoder's own rank saves."""
    return 1 - heterogeneous_step_s(model, gpu) / homogeneous_step_s(model, gpu)


def _cost_model(model: ModelSpec, gpu: str) -> CostModel:
    return CostModel(model, load_cluster(gpu), TrainingSettings())


def homogeneous_step_s(model: ModelSpec, gpu: str) -> float:
    """Seconds of a step with the encoder inside the first stage, a sample at a time."""
    costs = _cost_model(model, gpu)
    (vision,) = costs.stages(costs.module("vision", replace(_LANGUAGE, pp=1), samples=1))
    first, last = costs.stages(costs.module("language", _LANGUAGE, samples=1))
    language = ModuleInStep(name="language", stages=(joined(first, vision), last))
    return step_breakdown(
        {"language": language}, edges=(), kind="1f1b", num_microbatches=_BATCH // _LANGUAGE.dp
    ).step_s


def heterogeneous_step_s(model: ModelSpec, gpu: str) -> float:
    """Seconds of a step with the encoder on one more rank, two samples at a time."""
    num_ranks = _LANGUAGE.num_ranks
    language = ModulePlacement(
        name="language",
        ranks=tuple(range(num_ranks)),
        tensor_model_parallel_size=_LANGUAGE.tp,
        data_parallel_size=_LANGUAGE.dp,
        pipeline_model_parallel_size=_LANGUAGE.pp,
        sequence_parallel=_LANGUAGE.sequence_parallel,
    )
    plan = Plan(
        world_size=num_ranks + 1,
        global_batch_size=_BATCH,
        micro_batch_size=1,
        modules={
            "vision": ModulePlacement(name="vision", ranks=(num_ranks,)),
            "language": language,
        },
        edges=(("vision", "language"),),
        schedule=ScheduleChoice(kind="1f1b"),
    )
    return _cost_model(model, gpu).estimate(plan).step_s


def print_gains() -> list[dict[str, object]]:
    """Prints predictions beside the published gains, and returns them for the results."""
    print(
        f"\nQwen3.5-VL-27B, 17 against 16 GPUs: step shorter by; GPU not stated, {STATED_GPU} here"
    )
    found = []
    for gain in gains():
        stated = gain.predicted[STATED_GPU]
        low, high = min(gain.predicted.values()), max(gain.predicted.values())
        sign = "right sign" if low > 0 else "WRONG SIGN"
        print(
            f"{gain.dataset:8} seq {gain.sequence_length}: published {gain.published:.1%}, "
            f"predicted {stated:.1%} ({100 * (stated - gain.published):+.1f} points); "
            f"over {', '.join(gain.predicted)}: {low:.1%} to {high:.1%}, {sign}"
        )
        found.append(
            {
                "dataset": gain.dataset,
                "sequence_length": gain.sequence_length,
                "published": gain.published,
                **gain.predicted,
            }
        )
    return found
