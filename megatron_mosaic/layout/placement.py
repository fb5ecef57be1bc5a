"""Where one module of the model runs and how it is split."""

from collections import Counter
from dataclasses import dataclass
from math import lcm, prod
from typing import Literal, get_args

from megatron_mosaic.errors import LayoutError, PlanError
from megatron_mosaic.fields import nearest, show
from megatron_mosaic.layout.attention import AttentionPlan
from megatron_mosaic.layout.grid import (
    Coordinates,
    ExpertCoordinates,
    check_expert_grid,
    index_of,
    position_of,
    rank_lists,
)
from megatron_mosaic.layout.ranks import show_ranks
from megatron_mosaic.layout.share import Share

Axis = Literal["tp", "cp", "dp", "pp"]
ExpertAxis = Literal["expt_tp", "ep", "expt_dp", "pp"]
Recompute = Literal["selective", "full"]
ItemOrder = Literal["in_order", "balanced"]

LANGUAGE = "language"  # the plan's name of the module that every other one is connected with

# Fastest first, Megatron's order. The experts of a stage have a grid of their own on its ranks.
AXES: tuple[Axis, ...] = ("tp", "cp", "dp", "pp")
EXPERT_AXES: tuple[ExpertAxis, ...] = ("expt_tp", "ep", "expt_dp", "pp")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModulePlacement:
    """Parallel sizes of one module and the ranks that host it.

    Field names are Megatron's, so a placement reads like its command line.

    Args:
        name: Key of the module in the plan, such as ``"vision"`` or ``"language"``.
        ranks: Global ranks in the order tp-cp-dp-pp, fastest first; any list without repeats, such
            as ``0-7`` or ``[0, 2, 4-6]``, that overlaps those of other modules as it may.
        tensor_model_parallel_size: Ranks that split each layer.
        context_parallel_size: Ranks that split each sequence.
        data_parallel_size: Replicas; the sizes multiply to the number of ranks.
        pipeline_model_parallel_size: Ranks that follow one another in a pipeline.
        sequence_parallel: Splits norms and dropout of the language model over its tensor-parallel
            ranks, too.
        trainable: What trains: parts of the module (``encoder``, ``projector`` of vision;
            ``embedding``, ``decoder``, ``output_layer`` of language), or patterns on names of its
            parameters, with layers counted over all stages, such as ``decoder.layers.3.*`` or
            ``"*.lora_*"``; ``None`` is everything, ``()`` is nothing. The script freezes: if it
            freezes something else, the run stops and names the first such parameter.
        virtual_pipeline_model_parallel_size: Stages of each rank, with ``interleaved``,
            ``bubble_fill`` or ``concurrent``; of an encoder, chunks of its layers. Stage
            ``s`` of all is on ranks of pipeline place ``s % pipeline_model_parallel_size``, as
            Megatron interleaves them.
        layers_per_stage: Layers of each stage, all of every rank; ``None`` is an even split.
        expert_model_parallel_size: Parts into which the list of experts is split.
        expert_tensor_parallel_size: Ranks that split each expert; ``None`` is
            ``tensor_model_parallel_size``.
        recompute: Activations that a backward pass computes again: ``"selective"`` those of the
            attention operator, ``"full"`` all but each layer's input; ``None`` leaves it to the
            script and its arguments.
        attention: Mask of the language model and its tokens' ranks; ``None`` is Megatron's own
            causal attention.
        items: Which replica of an encoder runs which items (images, sounds) of a task:
            ``"in_order"`` runs equally many consecutive samples on each, ``"balanced"`` gives
            each items that cost about the same.
        share: Quota of its GPUs while other modules run there at the same time; ``None`` is none.

    Raises:
        PlanError: ``recompute`` or ``items`` is another word.
        LayoutError: A size is not positive, a rank repeats or is negative, the sizes do not
            multiply to the number of ranks, ``layers_per_stage`` does not name every stage,
            sequence parallelism has no tensor parallelism to work with, attention splits
            tokens without context parallelism, attention or items stand in a module of the
            other kind, or the experts of a stage cannot be split over its ranks.
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
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    recompute: Recompute | None = None
    virtual_pipeline_model_parallel_size: int = 1
    attention: AttentionPlan | None = None
    items: ItemOrder = "in_order"
    share: Share | None = None

    def __post_init__(self) -> None:
        where = f"modules.{self.name}"
        self._check_ranks(where)
        self._check_sizes(where)
        self._check_layers(where)
        self._check_recompute(where)
        self._check_attention(where)
        self._check_items(where)
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            # Megatron switches it off here without a word.
            raise LayoutError(
                f"{where}: sequence_parallel=true must go with tensor_model_parallel_size > 1, "
                f"not 1; remove the key or raise the size"
            )
        self._check_experts(where)

    def _check_experts(self, where: str) -> None:
        expt_tp = self.expert_tensor_parallel_size
        if expt_tp == self.tensor_model_parallel_size:
            # One way to say it, so that equal plans are equal.
            object.__setattr__(self, "expert_tensor_parallel_size", None)
        check_expert_grid(
            where,
            self.shape,
            expt_tp=self.tensor_model_parallel_size if expt_tp is None else expt_tp,
            ep=self.expert_model_parallel_size,
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
        virtual = "virtual_pipeline_model_parallel_size"
        for field, size in {**self.sizes(), virtual: getattr(self, virtual)}.items():
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
        if len(self.layers_per_stage) != self.num_stages:
            factors = f"pipeline_model_parallel_size={self.pipeline_model_parallel_size}"
            if self.virtual_pipeline_model_parallel_size > 1:
                factors += (
                    f" * virtual_pipeline_model_parallel_size="
                    f"{self.virtual_pipeline_model_parallel_size}"
                )
            raise LayoutError(
                f"{where}: layers_per_stage={list(self.layers_per_stage)} must have "
                f"{factors} entries; give one number for each stage"
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

    def _check_attention(self, where: str) -> None:
        attention = self.attention
        if attention is None:
            return
        if self.name != LANGUAGE:
            raise LayoutError(
                f"{where}: attention={attention.mask} must not stand in a module beside language, "
                f"whose items see all of themselves; remove the key"
            )
        for field, value in attention.written().items():
            if field != "mask" and self.context_parallel_size == 1:
                raise LayoutError(
                    f"{where}: attention.{field}={value} must go with context_parallel_size > 1, "
                    f"not 1; remove the key or raise the size"
                )

    def _check_items(self, where: str) -> None:
        orders = get_args(ItemOrder)
        if self.items not in orders:
            advice = nearest(self.items, orders, otherwise="remove the key for in_order")
            raise PlanError(
                f"{where}: items={show(self.items)} must be one of {', '.join(orders)}; {advice}"
            )
        if self.items != "in_order" and self.name == LANGUAGE:
            raise LayoutError(
                f"{where}: items={self.items} must stand in an encoder, not in language, which "
                f"runs whole samples; remove the key"
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

    @property
    def num_stages(self) -> int:
        """Stages of the module, those that share ranks too."""
        return self.pipeline_model_parallel_size * self.virtual_pipeline_model_parallel_size

    @property
    def splits_experts(self) -> bool:
        """Whether the experts' grid is another than the module's own."""
        return self.expert_model_parallel_size > 1 or self.expert_tensor_parallel_size is not None

    @property
    def expert_shape(self) -> ExpertCoordinates:
        """Sizes of the experts' grid, on the same ranks: ``expt_tp*ep*expt_dp = tp*cp*dp``."""
        expt_tp = self.expert_tensor_parallel_size or self.tensor_model_parallel_size
        ep, shape = self.expert_model_parallel_size, self.shape
        expt_dp = shape.tp * shape.cp * shape.dp // (expt_tp * ep)
        return ExpertCoordinates(expt_tp, ep, expt_dp, shape.pp)

    def coordinates(self, rank: int) -> Coordinates:
        """Position of a global rank that hosts the module.

        Raises:
            LayoutError: The rank does not host the module.
        """
        return position_of(self._index(rank), self.shape)

    def expert_coordinates(self, rank: int) -> ExpertCoordinates:
        """Position in the experts' grid of a global rank that hosts the module.

        Raises:
            LayoutError: The rank does not host the module.
        """
        return position_of(self._index(rank), self.expert_shape)

    def _index(self, rank: int) -> int:
        if rank not in self.ranks:
            raise LayoutError(
                f"modules.{self.name}: rank={rank} must be one of {list(self.ranks)}; "
                f"ask only ranks that host the module"
            )
        return self.ranks.index(rank)

    def rank_at(self, *, tp: int = 0, cp: int = 0, dp: int = 0, pp: int = 0) -> int:
        """Global rank at a position of the grid."""
        return self.ranks[index_of(Coordinates(tp, cp, dp, pp), self.shape)]

    def stage_ranks(self, stage: int) -> tuple[int, ...]:
        """Ranks of one stage, in grid order."""
        per_stage = len(self.ranks) // self.pipeline_model_parallel_size
        position = stage % self.pipeline_model_parallel_size
        return self.ranks[position * per_stage : (position + 1) * per_stage]

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Stages that a global rank hosts, ascending.

        Raises:
            LayoutError: The rank does not host the module.
        """
        position = self.coordinates(rank).pp
        return tuple(range(position, self.num_stages, self.pipeline_model_parallel_size))

    def groups(self, *axes: Axis) -> list[tuple[int, ...]]:
        """Rank lists that differ only along ``axes``, as Megatron orders their members.

        ``groups("tp")`` are the tensor-parallel groups, ``groups("tp", "pp")`` the
        model-parallel ones. Every rank of the module is in exactly one of them.
        """
        return rank_lists(self.ranks, self.shape, axes=axes)

    def expert_groups(self, *axes: ExpertAxis) -> list[tuple[int, ...]]:
        """Rank lists that differ only along ``axes`` of the experts' grid.

        ``expert_groups("ep")`` exchange tokens, ``expert_groups("expt_dp")`` are replicas.
        """
        return rank_lists(self.ranks, self.expert_shape, axes=axes)

    def task_groups(self) -> list[tuple[int, ...]]:
        """Rank lists that run each task together, because of the collectives inside it.

        Those are the tensor- and context-parallel ranks of a replica, and the ranks that share a
        set of experts. Both are runs of equal length in a stage, so where they overlap they join
        into runs of their least common multiple, which divides the stage as both do.
        """
        shape, expert_shape = self.shape, self.expert_shape
        size = lcm(shape.tp * shape.cp, expert_shape.expt_tp * expert_shape.ep)
        return [self.ranks[first : first + size] for first in range(0, len(self.ranks), size)]
