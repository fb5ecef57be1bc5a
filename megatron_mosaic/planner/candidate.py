"""A layout as the planner sees it: sizes and hosts, without lists of ranks until it is chosen."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_mosaic.cost.sizes import ParallelSizes
from megatron_mosaic.layout.attention import AttentionPlan
from megatron_mosaic.layout.grid import Coordinates, index_of
from megatron_mosaic.layout.placement import LANGUAGE, ModulePlacement
from megatron_mosaic.layout.plan import Plan, ScheduleChoice, ScheduleKind
from megatron_mosaic.layout.share import Share
from megatron_mosaic.model.spec import ModelSpec
from megatron_mosaic.model.workload import Workload
from megatron_mosaic.planner.problem import has_experts

Host = Literal["language", "first_stage", "replicated", "apart", "together"]
"""Where an encoder runs.

``language``: all ranks of the language model. ``first_stage``: those of its first stage.
``replicated``: of its first stage those of the first context-parallel rank; what Megatron has
them do, all context-parallel ranks would do alike. ``apart``: ranks of its own. ``together``:
ranks that it shares with the other encoders alone.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderChoice:
    """How one encoder is split, and where it runs."""

    name: str
    sizes: ParallelSizes
    host: Host

    @property
    def shares(self) -> bool:
        """Whether it runs on ranks of the language model."""
        return self.host in ("language", "first_stage", "replicated")


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A layout with its schedule; layers are split over stages when it is estimated.

    Args:
        micro_batch_size: Samples of one microbatch of one replica of the language model.
        language: Sizes of the language model.
        encoders: The other modules, in the order of their names.
        kind: Schedule.
        encoder_group: Microbatches of one encoder task with ``colocated``, ``bubble_fill`` and
            ``concurrent``; 1 otherwise.
        ahead: Frozen encoders run a step ahead, with the last two of them.
        quotas: Modules that have a part of their GPUs' multiprocessors while others run there
            too, by name, with ``concurrent``.
    """

    micro_batch_size: int
    language: ParallelSizes
    encoders: tuple[EncoderChoice, ...] = ()
    kind: ScheduleKind
    encoder_group: int = 1
    ahead: bool = False
    quotas: tuple[tuple[str, int], ...] = ()

    @property
    def num_ranks(self) -> int:
        """Ranks that host something."""
        together = [e.sizes.num_ranks for e in self.encoders if e.host == "together"]
        apart = sum(e.sizes.num_ranks for e in self.encoders if e.host == "apart")
        return self.language.num_ranks + apart + max(together, default=0)

    @property
    def placement(self) -> str:
        """Kind of the placement, in a word."""
        hosts = {encoder.host for encoder in self.encoders}
        if self.is_homogeneous:
            return "homogeneous"
        if hosts <= {"apart", "together"}:
            return "disjoint"
        return "colocated" if hosts == {"language"} else "partial overlap"

    @property
    def is_homogeneous(self) -> bool:
        """Whether stock arguments run it: encoders inherit the language model's sizes.

        They run with the first stage. Megatron gives encoders no context parallelism of their
        own; where their parts allow it the planner's baseline has it all the same.
        """
        return (
            all(
                encoder.host
                in ("replicated", "first_stage" if self.language.pp > 1 else "language")
                and encoder.sizes.tp == self.language.tp
                and encoder.sizes.dp == self.language.dp
                and encoder.sizes.pp == 1
                and encoder.sizes.recompute == self.language.recompute
                for encoder in self.encoders
            )
            and self.kind not in ("bubble_fill", "concurrent")
            and self.encoder_group == 1
        )


def plan_of(
    candidate: Candidate,
    *,
    model: ModelSpec,
    num_gpus: int,
    global_batch_size: int,
    layers_per_stage: Mapping[str, tuple[int, ...]],
    predicted: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Plan:
    """Places a candidate on ranks: the language model first, then what is apart from it."""
    ranks = {LANGUAGE: tuple(range(candidate.language.num_ranks))}
    ranks |= _encoder_ranks(candidate)
    sizes = {LANGUAGE: candidate.language} | {e.name: e.sizes for e in candidate.encoders}
    modules = {
        name: _placement(name, ranks[name], sizes[name], layers_per_stage[name], model)
        for name in sizes
    }
    modules |= {
        name: replace(modules[name], share=Share(sms=sms)) for name, sms in candidate.quotas
    }
    group = None
    if candidate.kind in ("colocated", "bubble_fill", "concurrent"):
        samples = candidate.micro_batch_size * candidate.language.dp
        num_microbatches = global_batch_size // samples
        group = candidate.encoder_group
        if candidate.kind == "colocated" and group == num_microbatches:
            group = None
    return Plan(
        world_size=num_gpus,
        global_batch_size=global_batch_size,
        micro_batch_size=candidate.micro_batch_size,
        modules=modules,
        edges=model.edges,
        schedule=ScheduleChoice(kind=candidate.kind, encoder_group=group, ahead=candidate.ahead),
        predicted=predicted,
        inputs=inputs,
    )


def _encoder_ranks(candidate: Candidate) -> dict[str, tuple[int, ...]]:
    language, ranks, first = candidate.language, {}, candidate.language.num_ranks
    shape = Coordinates(language.tp, language.cp, language.dp, language.pp)
    for encoder in candidate.encoders:
        match encoder.host:
            case "replicated":
                ranks[encoder.name] = tuple(
                    index_of(Coordinates(tp, 0, dp, 0), shape)
                    for dp in range(language.dp)
                    for tp in range(language.tp)
                )
            case "language" | "first_stage":
                ranks[encoder.name] = tuple(range(encoder.sizes.num_ranks))
            case "apart":
                ranks[encoder.name] = tuple(range(first, first + encoder.sizes.num_ranks))
                first += encoder.sizes.num_ranks
    for encoder in candidate.encoders:
        if encoder.host == "together":
            ranks[encoder.name] = tuple(range(first, first + encoder.sizes.num_ranks))
    return ranks


def _placement(
    name: str,
    ranks: tuple[int, ...],
    sizes: ParallelSizes,
    layers_per_stage: tuple[int, ...],
    model: ModelSpec,
) -> ModulePlacement:
    return ModulePlacement(
        name=name,
        ranks=ranks,
        tensor_model_parallel_size=sizes.tp,
        context_parallel_size=sizes.cp,
        data_parallel_size=sizes.dp,
        pipeline_model_parallel_size=sizes.pp,
        virtual_pipeline_model_parallel_size=sizes.chunks,
        sequence_parallel=sizes.sequence_parallel,
        trainable=model.modules[name].trainable,
        # An even split is what a plan without the key means.
        layers_per_stage=layers_per_stage if len(set(layers_per_stage)) > 1 else None,
        expert_model_parallel_size=sizes.ep,
        expert_tensor_parallel_size=sizes.etp if _has_experts(name, model) else None,
        recompute=sizes.recompute,
        attention=_attention(sizes, model) if name == LANGUAGE else None,
        items=sizes.items,
    )


def _attention(sizes: ParallelSizes, model: ModelSpec) -> AttentionPlan | None:
    workload = Workload.of(model)
    if workload is None:
        return None
    if sizes.cp == 1:
        return AttentionPlan(mask=workload.mask)
    return AttentionPlan(mask=workload.mask, tokens=sizes.tokens, keys=sizes.keys)


def _has_experts(name: str, model: ModelSpec) -> bool:
    return has_experts(model.modules[name])
