"""Plans in which any two choices of a layout occur together.

All combinations of the factors below would be thousands of plans. What goes wrong, goes wrong
between two features: so few plans are chosen such that every legal pair is in one of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import combinations, product

FACTORS: dict[str, tuple] = {
    "tp": (1, 2),
    "cp": (1, 2),
    "dp": (1, 2),
    "pp": (1, 2),
    "ep": (1, 2),
    "sp": (False, True),
    "vision": ("dp", "tp", "cp", "pp"),
    "placement": ("equal", "disjoint", "overlapping", "interleaved", "idle"),
    "frozen": ("nothing", "encoder", "vision", "language"),
    "images": ("one", "ragged", "sparse"),
    "virtual": ("nothing", "language", "vision", "both"),
}
MAX_LANGUAGE_RANKS = 4

FREEZING = {
    "nothing": [],
    "encoder": ["--freeze-ViT"],
    "vision": ["--freeze-ViT", "--freeze-projection"],
    "language": ["--freeze-LM"],
}
TRAINABLE = {
    "nothing": ("", ""),
    "encoder": (", trainable: [projector]", ""),
    "vision": (", trainable: []", ""),
    "language": ("", ", trainable: []"),
}
# Uneven splits over two virtual stages, by the pipeline-parallel size, and the layers in all.
VIRTUAL_SPLITS = {1: [3, 1], 2: [1, 3, 2, 1]}
EXPERTS = ["--num-experts", "4", "--moe-router-topk", "2", "--moe-token-dispatcher-type"]


@dataclass(frozen=True, kw_only=True, order=True)
class Case:
    """One choice for every factor.

    Args:
        tp: Tensor-parallel size of the language model, as the next four are its sizes.
        sp: Sequence parallelism of the language model.
        vision: Axis along which the encoder is split.
        placement: How the ranks of both modules lie to each other.
        frozen: What does not train.
        images: Images of a sample, as the parity script names them.
        virtual: Which modules have two stages on each rank.
    """

    tp: int
    cp: int
    dp: int
    pp: int
    ep: int
    sp: bool
    vision: str
    placement: str
    frozen: str
    images: str
    virtual: str

    @property
    def name(self) -> str:
        """Name of the test."""
        sizes = "".join(
            f"{axis}{size}"
            for axis in ("tp", "cp", "dp", "pp", "ep")
            if (size := getattr(self, axis)) > 1
        )
        parts = (sizes or "one", "sp" * self.sp, f"v{self.vision}", self.placement)
        parts += (f"frozen_{self.frozen}", self.images)
        parts += (f"virtual_{self.virtual}",) if self.virtual != "nothing" else ()
        return "-".join(part for part in parts if part)

    @property
    def is_legal(self) -> bool:
        """Whether Megatron and the ranks allow it."""
        if self.num_ranks > MAX_LANGUAGE_RANKS or (self.sp and self.tp == 1):
            return False
        # Experts are split over the ranks of a stage; with tensor parallelism Megatron wants
        # sequence parallelism beside them.
        if self.ep > 1 and (self.tp * self.cp * self.dp == 1 or self.sp != (self.tp > 1)):
            return False
        return self.placement != "equal" or self.num_ranks > 1

    @property
    def num_ranks(self) -> int:
        """Ranks of the language model."""
        return self.tp * self.cp * self.dp * self.pp

    def pairs(self) -> Iterator[tuple]:
        """Yields every two of its choices."""
        choices = [(field.name, getattr(self, field.name)) for field in fields(self)]
        yield from combinations(choices, 2)

    def ranks(self) -> tuple[list[int], list[int], int]:
        """Ranks of vision and of language, and the size of the world."""
        count = self.num_ranks
        language = list(range(count))
        match self.placement:
            case "equal":
                return language, language, count
            case "overlapping":
                return [count - 1, count], language, count + 1
            case "interleaved":
                vision = [1, 3]
                others = [rank for rank in range(count + 2) if rank not in vision]
                language = others if count > 1 else [2]
                return vision, language, max(count + 2, 4)
            case "idle":
                return [count, count + 1], language, count + 3
        return [count, count + 1], language, count + 2

    def options(self) -> list[str]:
        """What the script is given."""
        experts = [*EXPERTS, "alltoall"] if self.ep > 1 else []
        depths = [*self._depth("encoder", "vision"), *self._depth("decoder", "language")]
        return ["--images", self.images, *FREEZING[self.frozen], *experts, *depths]

    def plan(self) -> str:
        """Text of the plan file."""
        vision, language, world_size = self.ranks()
        trainable = TRAINABLE[self.frozen]
        kind = self._schedule_kind(apart=set(vision).isdisjoint(language))
        return (
            f"format: 1\nworld_size: {world_size}\nglobal_batch_size: 16\nmicro_batch_size: 2\n"
            f"modules:\n"
            f"  vision: {{ranks: {vision}, {self._vision_sizes(len(vision))}{trainable[0]}}}\n"
            f"  language: {{ranks: {language}{self._language_sizes()}{trainable[1]}}}\n"
            f"edges: [[vision, language]]\nschedule: {{kind: {kind}}}\n"
        )

    def _schedule_kind(self, *, apart: bool) -> str:
        if self._is_virtual("language"):
            return "interleaved" if apart and self.pp > 1 else "bubble_fill, encoder_group: 2"
        return "1f1b" if apart else "colocated, encoder_group: 2"

    def _is_virtual(self, module: str) -> bool:
        return self.virtual in (module, "both")

    def _split(self, module: str) -> list[int]:
        stages = self.pp if module == "language" else 1 + (self.vision == "pp")
        return VIRTUAL_SPLITS[stages]

    def _depth(self, block: str, module: str) -> list[str]:
        if not self._is_virtual(module):
            return []
        return [f"--{block}-num-layers", str(sum(self._split(module)))]

    def _virtual_sizes(self, module: str) -> str:
        if not self._is_virtual(module):
            return ""
        split = self._split(module)
        return f", virtual_pipeline_model_parallel_size: 2, layers_per_stage: {split}"

    def _vision_sizes(self, count: int) -> str:
        virtual = self._virtual_sizes("vision")
        if self.vision == "pp":
            return f"pipeline_model_parallel_size: 2, data_parallel_size: {count // 2}{virtual}"
        axis = {"dp": "data", "tp": "tensor_model", "cp": "context"}[self.vision]
        return f"{axis}_parallel_size: {count}{virtual}"

    def _language_sizes(self) -> str:
        sizes = {
            "tensor_model_parallel_size": self.tp,
            "context_parallel_size": self.cp,
            "data_parallel_size": self.dp,
            "pipeline_model_parallel_size": self.pp,
            "expert_model_parallel_size": self.ep,
        }
        written = [f"{name}: {size}" for name, size in sizes.items() if size > 1]
        if self.sp:
            written.append("sequence_parallel: true")
        if self.ep > 1 and self.cp * self.dp == 1:
            written.append("expert_tensor_parallel_size: 1")
        return "".join(f", {each}" for each in written) + self._virtual_sizes("language")


@cache
def legal_cases() -> tuple[Case, ...]:
    """All legal combinations."""
    cases = (
        Case(**dict(zip(FACTORS, choices, strict=True))) for choices in product(*FACTORS.values())
    )
    return tuple(case for case in cases if case.is_legal)


@cache
def covering_cases() -> tuple[Case, ...]:
    """Legal combinations, as few as a greedy choice finds, that hold every legal pair."""
    pairs = {case: frozenset(case.pairs()) for case in legal_cases()}
    missing = set().union(*pairs.values())
    chosen = []
    while missing:
        # Of equally good ones the cheapest: fewer ranks, then in order.
        best = min(pairs, key=lambda case: (-len(pairs[case] & missing), case.ranks()[2], case))
        missing -= pairs[best]
        chosen.append(best)
    return tuple(chosen)


def uncovered_pairs(cases: Sequence[Case]) -> set[tuple]:
    """Legal pairs of choices that occur in none of some cases."""
    legal = {pair for case in legal_cases() for pair in case.pairs()}
    return legal - {pair for case in cases for pair in case.pairs()}
