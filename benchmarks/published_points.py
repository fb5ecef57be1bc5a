"""Published measurements as cases that the cost model can estimate, or a reason why it cannot."""

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.published_models import published_models, with_sequence
from benchmarks.published_settings import Point, Source, release_of, settings_of, source_of
from megatron_mosaic.cost.model_flops import model_flops_per_token
from megatron_mosaic.cost.sizes import ParallelSizes, TrainingSettings
from megatron_mosaic.errors import PlanError
from megatron_mosaic.model.spec import ModelSpec, Precision

POINTS = Path(__file__).resolve().parent / "data" / "published_points.csv"
COLUMNS = [
    "model",
    "params",
    "gpu",
    "num_gpus",
    "tp",
    "cp",
    "pp",
    "vpp",
    "dp",
    "ep",
    "seq_len",
    "mbs",
    "gbs",
    "precision",
    "metric",
    "value",
    "source",
]

_PRECISIONS: Mapping[str, Precision] = {
    "bf16": "bf16", "fp16": "bf16", "fp8": "fp8", "fp8-cs": "fp8", "fp8_cs": "fp8",
    "fp8-mx": "mxfp8", "fp8_mx": "mxfp8", "mxfp8": "mxfp8", "nvfp4": "nvfp4",
}  # fmt: skip
_TIMES = ("step_time_ms", "step_time_s")
_TFLOPS = ("model_tflops_per_gpu", "model_tflops_per_gpu_median")
_MEMORY = (
    "peak_alloc_gib", "param_opt_mem_gib", "activation_mem_gib_no_recompute",
    "activation_mem_gib_seqpar_selective",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A row with everything that an estimate needs.

    Args:
        point: The row.
        source: Group in which its error is counted.
        model: Geometry, with the row's sequence length.
        gpu: Name of the GPU.
        num_gpus: GPUs of the run.
        sizes: Parallel sizes of the language model.
        micro_batch_size: Samples of a microbatch.
        global_batch_size: Samples of a step.
        settings: What the source says, or its launch scripts do, for all modules alike.
        metric: Unit of the published value.
        value: The published value.
        step_s: The same as seconds of a step; ``None`` for a row about memory.
        release: Release of the software that was measured, for sources that repeat layouts.
    """

    point: Point
    source: Source
    model: ModelSpec
    gpu: str
    num_gpus: int
    sizes: ParallelSizes
    micro_batch_size: int
    global_batch_size: int
    settings: TrainingSettings
    metric: str
    value: float
    step_s: float | None
    release: tuple[int, ...] = ()

    @property
    def layout(self) -> tuple[object, ...]:
        """What tells configurations apart, whatever software or unit they were measured with."""
        model = self.model
        return (
            self.source,
            (model.name, model.language.num_layers, model.sequence_length, model.precision),
            (self.gpu, self.num_gpus, self.sizes),
            (self.micro_batch_size, self.global_batch_size),
            (self.settings.fsdp, model.language.trainable),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """A row that is left out, and why."""

    point: Point
    reason: str


class _SkipError(Exception):
    """The reason for which a row is left out."""


def read_points(path: Path = POINTS) -> list[Point]:
    """Reads a points file.

    Raises:
        PlanError: The file has no header with the columns that a point needs, or none at all.
    """
    with path.open(newline="") as lines:
        rows = csv.DictReader(lines)
        missing = [column for column in COLUMNS if column not in (rows.fieldnames or ())]
        if missing:
            raise PlanError(
                f"{path.name}: columns={','.join(rows.fieldnames or ())} must have "
                f"{', '.join(missing)}; see the columns of {POINTS.name}"
            )
        return [
            Point(line=number, fields={key: row[key] or "" for key in COLUMNS})
            for number, row in enumerate(rows, start=2)
        ]


def cases_of(points: Iterable[Point]) -> tuple[list[Case], list[Skipped]]:
    """Makes a case of every row that can be estimated, and says why the others cannot."""
    given = list(points)
    points = [_with_agreeing_length(point, given) for point in given]
    known = _stated_chunks([*read_points(), *points])
    cases: list[Case] = []
    skipped: list[Skipped] = []
    for point in points:
        try:
            cases.append(_case(point, known))
        except _SkipError as reason:
            skipped.append(Skipped(point=point, reason=str(reason)))
    return cases, skipped


def newest(cases: Iterable[Case]) -> list[Case]:
    """Keeps the newest release of every layout, and one of several units of the same run.

    Source:
        The data's own caveat: releases repeat layouts with new software, the newest is current.
    """
    best: dict[tuple[object, ...], Case] = {}
    for case in cases:
        held = best.get(case.layout)
        if held is None or _rank(case) > _rank(held):
            best[case.layout] = case
    return list(best.values())


def _rank(case: Case) -> tuple[tuple[int, ...], int]:
    # A stated time before one that follows from tokens, and that before one from TFLOPS.
    order = {"step_time_ms": 2, "step_time_s": 2, "tokens_per_sec_per_gpu": 1}
    return case.release, order.get(case.metric, 0)


def _with_agreeing_length(point: Point, points: Sequence[Point]) -> Point:
    # A sequence length that was inferred must agree with the TFLOPS of the same run: some are half.
    if "seq_len inferred" not in point.fields["source"] or "VLM" in point.fields["model"]:
        return point
    same = {
        other.fields["metric"]: float(other.fields["value"])
        for other in points
        if all(other.fields[key] == point.fields[key] for key in COLUMNS[:14])
    }
    if not {"step_time_ms", "model_tflops_per_gpu"} <= set(same):
        return point
    try:
        case = _case(point, {})
    except _SkipError:
        return point
    flops = same["step_time_ms"] / 1e3 * same["model_tflops_per_gpu"] * 1e12 * case.num_gpus
    length = case.model.sequence_length
    ratio = flops / (source_flops_per_token(case) * case.global_batch_size * length)
    scale = next((s for s in (2, 4) if abs(ratio / s - 1) < 0.1), 1)
    return replace(point, fields={**point.fields, "seq_len": str(length * scale)})


def _stated_chunks(points: Iterable[Point]) -> Mapping[tuple[str, str, str], int]:
    # An empty cell is not a 1: the same model on the same GPU with as many stages says more.
    return {
        _chunks_key(point): chunks
        for point in points
        if (chunks := point.whole("vpp")) is not None and chunks > 1
    }


def _chunks_key(point: Point) -> tuple[str, str, str]:
    name = re.sub(r"[^a-z0-9]", "", point.fields["model"].lower().split("(")[0])
    if name.startswith("gpt") and "2205.05198" in point.fields["source"]:
        name = f"gpt{point.fields['params']}"  # its models differ in size alone
    return name, point.fields["gpu"], point.fields["pp"]


def _case(point: Point, known_chunks: Mapping[tuple[str, str, str], int]) -> Case:
    cells, name = point.fields, point.fields["model"].lower()
    metric, value = cells["metric"], _number(cells["value"])
    if metric not in (*_TIMES, *_TFLOPS, "tokens_per_sec_per_gpu", *_MEMORY):
        raise _SkipError(f"{metric} is a ratio or a rate without a layout of its own")
    source = source_of(point)
    if source is None:
        raise _SkipError("its source states neither a microbatch size nor the geometry")
    if source in ("cards", "vlm") and metric not in _MEMORY and _is_sanity_run(point):
        raise _SkipError("a sanity run of a verification card, untuned by its own words")
    model = _model(point, name)
    num_gpus = _need(point, "num_gpus")
    mbs, gbs = _batch(point, source)
    sizes = _sizes(point, source, num_gpus)
    if sizes.pp > 1 and not point.fields["vpp"].strip():
        sizes = replace(sizes, chunks=known_chunks.get(_chunks_key(point), 1))
    if gbs % (mbs * sizes.dp):
        raise _SkipError(f"gbs={gbs} is not a multiple of mbs*dp={mbs}*{sizes.dp}")
    case = Case(
        point=point, source=source, model=model, gpu=cells["gpu"].replace("A100-80G", "A100"),
        num_gpus=num_gpus, sizes=sizes, micro_batch_size=mbs, global_batch_size=gbs,
        settings=settings_of(point, source, model, sizes), metric=metric, value=value, step_s=None,
        release=release_of(cells["source"]),
    )  # fmt: skip
    return replace(case, step_s=_step_s(case))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise _SkipError(f"value={text!r} is not a number") from None


def _need(point: Point, column: str) -> int:
    value = point.whole(column)
    if value is None:
        raise _SkipError(f"{column} is not stated")
    return value


def _is_sanity_run(point: Point) -> bool:
    card = "model_verification_cards" in point.fields["source"]
    return card and "_performance" not in point.fields["model"].lower()


def _model(point: Point, name: str) -> ModelSpec:
    if "tokendrop" in name:
        raise _SkipError("drops tokens beyond a capacity that is not stated")
    if name.startswith("gpt") and "2205.05198" in point.fields["source"]:
        name = f"gpt {point.fields['params'].lower()}"
    makers = published_models()
    known = [start for start in makers if name.startswith(start)]
    if not known:
        raise _SkipError("the geometry of this model is not known here")
    model = makers[max(known, key=len)]()
    precision = _PRECISIONS.get(point.fields["precision"].strip().lower())
    if precision is None:
        raise _SkipError("precision is not stated")
    model = replace(with_sequence(model, _need(point, "seq_len")), precision=precision)
    return _frozen(model, f"{name} {point.fields['source'].lower()}")


def _frozen(model: ModelSpec, text: str) -> ModelSpec:
    modules = dict(model.modules)
    if "lora" in text or "peft" in text:
        for key, module in modules.items():
            # Rank of the recipes' own default where a row does not say.
            rank = int(found[1]) if (found := re.search(r"lora rank (\d+)", text)) else 16
            trains = ("*lora*",) if key == "language" else ()
            modules[key] = replace(module, trainable=trains, lora_rank=rank if trains else 0)
    elif "language and vision towers" in text:
        modules["language"] = replace(modules["language"], trainable=())
        modules["vision"] = replace(modules["vision"], trainable=("projector",))
    elif "frozen: vision encoder" in text and "vision" in modules:
        modules["vision"] = replace(modules["vision"], trainable=("projector",))
    return replace(model, modules=modules)


def _batch(point: Point, source: Source) -> tuple[int, int]:
    # NeMo's long-sequence recipes all have microbatches of one sample.
    mbs = point.whole("mbs", 1 if source == "nemo-cp" else None)
    if mbs is None:
        raise _SkipError("mbs is not stated")
    return mbs, _need(point, "gbs")


def _sizes(point: Point, source: Source, num_gpus: int) -> ParallelSizes:
    tp, pp, cp = (point.whole(column, 1) or 1 for column in ("tp", "pp", "cp"))
    if not (point.fields["tp"].strip() or point.fields["pp"].strip()):
        raise _SkipError("the layout is not stated")
    if num_gpus % (tp * pp * cp):
        raise _SkipError(f"num_gpus={num_gpus} is not a multiple of tp*cp*pp={tp * pp * cp}")
    if not point.fields["ep"].strip() and source in ("automodel", "bridge-moe", "recipes"):
        raise _SkipError("ep of a mixture of experts is not stated")
    ep = point.whole("ep", 1) or 1
    dp = num_gpus // (tp * pp * cp)
    if (tp * cp * dp) % ep:
        raise _SkipError(f"ep={ep} does not divide tp*cp*dp={tp * cp * dp}")
    text = f"{point.fields['model']} {point.fields['source']} {point.fields['metric']}".lower()
    projector_alone = source == "vlm" and "language and vision towers" in text
    full = re.search(r"full[-_ ]recompute", text) or projector_alone
    selective = re.search(r"selective[-_ ]recompute|seqpar_selective", text)
    return ParallelSizes(
        tp=tp, cp=cp, dp=dp, pp=pp, ep=ep, etp=1,
        sequence_parallel=tp > 1 and not (source == "a100-2205.05198" and not selective),
        recompute="full" if full else "selective" if selective else None,
        chunks=point.whole("vpp", 1) or 1,
    )  # fmt: skip


def _step_s(case: Case) -> float | None:
    tokens = case.global_batch_size * case.model.sequence_length
    if case.metric in _MEMORY:
        return None
    if case.metric == "step_time_ms":
        return case.value / 1e3
    if case.metric == "step_time_s":
        return case.value
    if case.metric == "tokens_per_sec_per_gpu":
        return tokens / case.num_gpus / case.value
    if case.source == "vlm":
        raise _SkipError("TFLOPS of vision-language models are unreliable: caveat 3 of the data")
    flops = source_flops_per_token(case) * tokens
    return flops / case.num_gpus / (case.value * 1e12)


def source_flops_per_token(case: Case) -> float:
    """FLOPs of a token as the case's source counts them for its TFLOPS.

    Megatron counts causal attention half. NeMo's formulas of the long-sequence table count it
    whole: halved, the B200 row with a million tokens would be beyond its bf16 attention.

    Source:
        num_floating_point_operations in Megatron-LM's training.py and Megatron-Bridge's
        flop_utils.py (067f987); NeMo's flops_formulas.py before it knew causal attention.
    """
    language = case.model.language
    return model_flops_per_token(language, full_attention=case.source == "nemo-cp")
