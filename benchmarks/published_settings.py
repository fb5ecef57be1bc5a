"""What published rows and the scripts behind them say: source, release, settings of the run."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_mosaic.cost.sizes import ParallelSizes, TrainingSettings
from megatron_mosaic.model.spec import ModelSpec

Source = Literal[
    "simumax", "a100-2205.05198", "bridge-dense", "bridge-moe", "bridge-lora", "vlm", "recipes",
    "nemo-cp", "cards", "automodel",
]  # fmt: skip
# Words of a source, and the group that a row belongs to unless its model says more.
_SOURCES: Mapping[str, Source] = {
    "SimuMax": "simumax",
    "2205.05198": "a100-2205.05198",
    "Automodel": "automodel",
    "model_verification_cards": "cards",
    "moe_recipes": "recipes",
    "performance_long_sequence": "nemo-cp",
    "performance-summary": "bridge-dense",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One row of a points file.

    Args:
        line: Its line in the file.
        fields: Its cells by column.
    """

    line: int
    fields: Mapping[str, str]

    def whole(self, column: str, otherwise: int | None = None) -> int | None:
        """A cell as a whole number, or ``otherwise`` where it is empty."""
        text = self.fields[column].strip()
        return int(float(text)) if text else otherwise


def source_of(point: Point) -> Source | None:
    """Group in which the errors of a row are counted; ``None`` where none fits."""
    text, name = point.fields["source"], point.fields["model"].lower()
    source: Source | None = next(
        (group for words, group in _SOURCES.items() if words in text), None
    )
    if source in ("cards", "bridge-dense") and re.search(r"vlm|[_-]vl[_-]", name):
        return "vlm"
    if source != "bridge-dense":
        return source
    if re.search(r"lora|peft", name):
        return "bridge-lora"
    active = re.search(r"-a\d+b", point.fields["params"].lower())
    experts = re.search(r"deepseek|oss|_a\d+b|nemotron_3|kimi|mixtral|next", name)
    return "bridge-moe" if active or experts else "bridge-dense"


def settings_of(
    point: Point, source: Source, model: ModelSpec, sizes: ParallelSizes
) -> TrainingSettings:
    """What a run does for all modules, as its source says, or the scripts of its source do."""
    text = point.fields["source"]
    if source == "simumax":
        # docs/b200/b200_real_repro_guide.md: no overlap anywhere; cp-comm-type is all-to-all.
        return TrainingSettings(
            overlap_grad_reduce=False, overlap_param_gather=False, cp_comm="a2a"
        )
    if source == "a100-2205.05198":
        return TrainingSettings(
            distributed_optimizer=False, overlap_grad_reduce=False, overlap_param_gather=False,
            flash_attention=False, dropout=True, cross_entropy_fusion=False,
            # Software of 2022: interleaved stages waited for messages, which tensor ranks shared.
            overlap_p2p=False, split_hops=True,
        )  # fmt: skip
    if source == "vlm":
        # perf_recipes/qwen_vl/common.py (067f987): no graphs with samples of unlike length, no
        # overlap of gradients or weights.
        return TrainingSettings(
            gradient_bytes=2, overlap_grad_reduce=False, overlap_param_gather=False,
            moe_dispatcher="flex",
        )  # fmt: skip
    graph = _cuda_graph(point, model)
    fsdp = "FSDP=" in text or "FSDP2=" in text or (
        # NVFP4 repeats the layout of the rows that name FSDP, where nothing else fits 70B.
        model.name == "llama-3-70b" and sizes.tp * sizes.pp == 1 and sizes.dp > 1
            and model.language.trainable is None
    )  # fmt: skip
    return TrainingSettings(
        # Megatron-Bridge's mixed precision recipes reduce gradients in 2 bytes.
        gradient_bytes=2, fsdp=fsdp, tp_comm_overlap=sizes.tp > 1 and not sizes.ep > 1,
        moe_dispatcher="flex", cuda_graph=graph, moe_overlap=_moe_overlap(point, model, graph),
        fp8_attention=_fp8_attention(point, model, graph),
        fp8_output=graph == "full" and model.name.startswith(("deepseek", "gpt-oss")),
    )  # fmt: skip


def _fp8_attention(point: Point, model: ModelSpec, graph: str) -> bool:
    # The same recipes: with whole-iteration graphs but for DeepSeek on GB200, and hybrid models.
    nvl72 = point.fields["gpu"] in ("GB200", "GB300")
    if model.name.startswith("nemotron"):
        return model.precision == "mxfp8" and nvl72
    on_gb200 = model.name.startswith("deepseek") and point.fields["gpu"] == "GB200"
    return graph == "full" and not on_gb200


def _moe_overlap(point: Point, model: ModelSpec, graph: str) -> bool:
    # The same recipes: with whole-iteration graphs, and without them where tokens leave a node.
    text = point.fields["source"].lower()
    if "automodel" in text:
        return False
    if "moe_recipes" in text:
        return "ep overlap" in text
    far = model.name in ("deepseek-v3", "qwen3-235b-a22b", "kimi-k2")
    return graph == "full" or (far and point.fields["gpu"] in ("H100", "B200"))


def _cuda_graph(point: Point, model: ModelSpec) -> Literal["none", "partial", "full"]:
    # Megatron-Bridge's perf_recipes (067f987): whole iterations for MXFP8 on NVL72 and, with
    # DeepSeek, on B300, since release 26.06 but not for hybrid models; attention, router and
    # preprocessing on NVL72 otherwise and for Qwen3-30B on H100 in fp8.
    gpu, release = point.fields["gpu"], release_of(point.fields["source"])
    nvl72, deepseek = gpu in ("GB200", "GB300"), model.name.startswith("deepseek")
    hybrid = model.name.startswith("nemotron")
    text = point.fields["source"].lower()
    if "automodel" in text:
        return "none"
    recent = not release or release >= (26, 6)
    if "moe_recipes" in text:
        return "full" if "full cg" in text else "partial" if "cg" in text else "none"
    if model.precision == "mxfp8" and recent and not hybrid and (nvl72 or deepseek):
        return "full"
    if nvl72 or (model.name.startswith("qwen3-30b") and gpu == "H100" and recent):
        return "partial"
    return "none"


def release_of(source: str) -> tuple[int, ...]:
    """Release of the software that a source names; empty where it names none."""
    found = re.search(r"rel (\d+(?:\.\d+)*)", source)
    return tuple(map(int, found[1].split("."))) if found else ()
