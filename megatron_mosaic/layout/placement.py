"""Where one module of the model runs and how it is split."""

from collections import Counter
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Literal, NamedTuple, get_args

from megatron_mosaic.errors import LayoutError, PlanError
from megatron_mosaic.layout.fields import nearest, show
from megatron_mosaic.layout.ranks import show_ranks

Axis = Literal["tp", "cp", "dp", "pp"]
Recompute = Literal["selective", "full"]

AXES: tuple[Axis, ...] = ("tp", "cp", "dp", "pp")  # fastest first, Megatron's order


class Coordinates(NamedTuple):
    """Position of one rank in a module's grid."""

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModulePlacement:
    """Parallel sizes of one module and the ranks that host it.

    Field names are Megatron's, so a placement reads like its command line.

    Args:
        name: Key of the module in the plan, such as ``"vision"`` or ``"language"``.
        ranks: Global ranks in the order tp-cp-dp-pp, fastest first; any list without repeats.
        trainable: What trains: parts of the module, or patterns on names of its parameters;
            ``None`` is everything, ``()`` is nothing.
        layers_per_stage: Layers of each pipeline stage; ``None`` is an even split.
        recompute: Activations that a backward pass computes again: ``"selective"`` those of the
            attention operator, ``"full"`` all but each layer's input; ``None`` leaves it to the
            script and its arguments.

    Raises:
        PlanError: ``recompute`` is another word.
        LayoutError: A size is not positive, a rank repeats or is negative, the sizes do not
            multiply to the number of ranks, ``layers_per_stage`` does not name every stage, or
            sequence parallelism has no tensor parallelism to work with.
    """

    name: str
    ranks: tuple[int, ...]
    tensor_model_parallel_size: int = 1
    context_parallel_size: int = 1
    data_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    sequence_parallel: bool = False
    trainable: tuple[str, ...] | None = None
    layers_per_stage: tuple[int, ...] | None = None
    recompute: Recompute | None = None

    def __post_init__(self) -> None:
        where = f"modules.{self.name}"
        self._check_ranks(where)
        self._check_sizes(where)
        self._check_layers(where)
        self._check_recompute(where)
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            # Megatron switches it off here without a word.
            raise LayoutError(
                f"{where}: sequence_parallel=true must go with tensor_model_parallel_size > 1, "
                f"not 1; remove the key or raise the size"
            )

    def _check_ranks(self, where: str) -> None:
        if not self.ranks:
            raise LayoutError(
                f"{where}: ranks=[] must name at least one rank; "
                f"list the ranks that host the module, or remove it"
            )
        shown = f"{where}: ranks={show_ranks(self.ranks)}"
        if min(self.ranks) < 0:
            raise LayoutError(f"{shown} must be >= 0; remove {min(self.ranks)}")
        repeated = sorted(rank for rank, times in Counter(self.ranks).items() if times > 1)
        if repeated:
            raise LayoutError(f"{shown} must not repeat {repeated}; list each rank once")

    def _check_sizes(self, where: str) -> None:
        for field, size in self.sizes().items():
            if size < 1:
                raise LayoutError(f"{where}: {field}={size} must be >= 1; use 1 to switch it off")
        num_positions = prod(self.shape)
        if num_positions != len(self.ranks):
            sizes = "*".join(map(str, self.shape))
            raise LayoutError(
                f"{where}: ranks={show_ranks(self.ranks)} must number TP*CP*DP*PP={sizes}="
                f"{num_positions}, not {len(self.ranks)}; change a size or the ranks"
            )

    def _check_layers(self, where: str) -> None:
        if self.layers_per_stage is None:
            return
        if len(self.layers_per_stage) != self.pipeline_model_parallel_size:
            raise LayoutError(
                f"{where}: layers_per_stage={list(self.layers_per_stage)} must have "
                f"pipeline_model_parallel_size={self.pipeline_model_parallel_size} entries; "
                f"give one number for each stage"
            )
        if min(self.layers_per_stage) < 1:
            raise LayoutError(
                f"{where}: layers_per_stage={list(self.layers_per_stage)} must be >= 1 everywhere; "
                f"give every stage a layer or lower pipeline_model_parallel_size"
            )

    def _check_recompute(self, where: str) -> None:
        kinds = get_args(Recompute)
        if self.recompute is not None and self.recompute not in kinds:
            advice = nearest(self.recompute, kinds, otherwise="remove the key for none")
            raise PlanError(
                f"{where}: recompute={show(self.recompute)} must be one of {', '.join(kinds)}; "
                f"{advice}"
            )

    def sizes(self) -> dict[str, int]:
        """Sizes of the grid's axes by Megatron's names, fastest axis first."""
        return {
            "tensor_model_parallel_size": self.tensor_model_parallel_size,
            "context_parallel_size": self.context_parallel_size,
            "data_parallel_size": self.data_parallel_size,
            "pipeline_model_parallel_size": self.pipeline_model_parallel_size,
        }

    @property
    def shape(self) -> Coordinates:
        """Sizes of the grid, one for each axis."""
        return Coordinates(*self.sizes().values())

    def coordinates(self, rank: int) -> Coordinates:
        """Position of a global rank that hosts the module.

        Raises:
            LayoutError: The rank does not host the module.
        """
        if rank not in self.ranks:
            raise LayoutError(
                f"modules.{self.name}: rank={rank} must be one of {list(self.ranks)}; "
                f"ask only ranks that host the module"
            )
        index = self.ranks.index(rank)
        position = []
        for size in self.shape:
            index, remainder = divmod(index, size)
            position.append(remainder)
        return Coordinates(*position)

    def rank_at(self, *, tp: int = 0, cp: int = 0, dp: int = 0, pp: int = 0) -> int:
        """Global rank at a position of the grid."""
        shape = self.shape
        return self.ranks[tp + shape.tp * (cp + shape.cp * (dp + shape.dp * pp))]

    def stage_ranks(self, stage: int) -> tuple[int, ...]:
        """Ranks of one pipeline stage, in grid order."""
        per_stage = len(self.ranks) // self.pipeline_model_parallel_size
        return self.ranks[stage * per_stage : (stage + 1) * per_stage]

    def groups(self, *axes: Axis) -> list[tuple[int, ...]]:
        """Rank lists that differ only along ``axes``, as Megatron orders their members.

        ``groups("tp")`` are the tensor-parallel groups, ``groups("tp", "pp")`` the
        model-parallel ones. Every rank of the module is in exactly one of them.
        """
        members: dict[tuple[int, ...], list[int]] = {}
        for position in product(*(range(size) for size in reversed(self.shape))):
            coordinates = Coordinates(*reversed(position))
            fixed = tuple(c for axis, c in zip(AXES, coordinates, strict=True) if axis not in axes)
            members.setdefault(fixed, []).append(self.rank_at(**coordinates._asdict()))
        return [tuple(ranks) for ranks in members.values()]
