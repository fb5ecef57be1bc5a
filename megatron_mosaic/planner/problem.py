"""What the planner is asked: a model, GPUs, a batch, and what the user has fixed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, get_args

import yaml

from megatron_mosaic.cluster.sm_partition import granularity, split_for
from megatron_mosaic.cluster.spec import Cluster, Gpu
from megatron_mosaic.cost.sizes import TrainingSettings
from megatron_mosaic.errors import PlanError
from megatron_mosaic.fields import nearest, show
from megatron_mosaic.layout.attention import KeyExchange
from megatron_mosaic.layout.placement import LANGUAGE, ItemOrder, Recompute
from megatron_mosaic.layout.plan import ScheduleKind
from megatron_mosaic.model.layers import Experts, SelfAttention
from megatron_mosaic.model.spec import LanguageHead, ModelSpec, ModuleSpec
from megatron_mosaic.model.workload import Workload
from megatron_mosaic.tokens.names import Method

_SIZES: Mapping[str, str] = {
    "tensor_model_parallel_size": "tp",
    "context_parallel_size": "cp",
    "data_parallel_size": "dp",
    "pipeline_model_parallel_size": "pp",
    "expert_model_parallel_size": "ep",
    "expert_tensor_parallel_size": "etp",
    "sequence_parallel": "sequence_parallel",
    "recompute": "recompute",
    "layers_per_stage": "layers_per_stage",
    "attention.tokens": "tokens",
    "attention.keys": "keys",
    "items": "items",
}
_WORDS: Mapping[str, tuple[str, ...]] = {
    "tokens": get_args(Method),
    "keys": get_args(KeyExchange),
    "items": get_args(ItemOrder),
}
SIZE_NAMES: Mapping[str, str] = {short: name for name, short in _SIZES.items()}
"""Megatron's names of the sizes by their short ones."""

QUOTA = "share.sms"
"""Name of a module's quota among the fields that can be fixed; ``none`` is no quota."""

RESERVED_BYTES = 3 * 2**30
"""Memory of a GPU for what the cost model does not count: the CUDA context and NCCL's buffers.

A context with PyTorch's kernels takes 0.4 GB, and a communicator 0.54 to 0.69 GB on A100s. With
those of tensor, data and pipeline parallelism and one of a boundary that is 2.6 to 3.2 GB. The
first all-to-all of eight H100s, as experts need it, takes 3.3 GB alone: an upper end, and not
counted.

Source: https://github.com/pytorch/pytorch/issues/109888 (context with lazy loading),
https://github.com/NVIDIA/nccl/issues/964 (communicators of two and of more A100s),
https://github.com/NVIDIA/nccl/issues/1685 (all-to-all).
"""

PLACEMENTS = ("homogeneous", "colocated", "disjoint", "partial overlap")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pins:
    """Fields of the plan that the user has fixed.

    Args:
        modules: Values by module and by the name of the size in ``ParallelSizes``, or
            ``layers_per_stage``.
        micro_batch_size: Samples of one microbatch.
        kind: Schedule.
        encoder_group: Microbatches of one encoder task.
        placement: One of ``PLACEMENTS``.
        quotas: Multiprocessors of modules while others run beside them; ``None`` is no quota.
    """

    modules: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    micro_batch_size: int | None = None
    kind: ScheduleKind | None = None
    encoder_group: int | None = None
    placement: str | None = None
    quotas: Mapping[str, int | None] = field(default_factory=dict)

    def allows(self, module: str, size: str, value: object) -> bool:
        """Whether a size of a module may have a value."""
        pinned = self.modules.get(module, {})
        return size not in pinned or pinned[size] == value


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """Where the planner looks; a wider space takes longer.

    Args:
        micro_batch_sizes: Samples of one microbatch.
        min_tokens_per_rank: Tokens that a context-parallel rank has at least.
        max_encoder_stages: Pipeline stages of an encoder with ranks of its own.
        recompute: What a backward pass may compute again.
        multiplexing: Whether modules may run at the same time on ranks that they share.
    """

    micro_batch_sizes: tuple[int, ...] = (1, 2, 4, 8)
    min_tokens_per_rank: int = 1024
    max_encoder_stages: int = 8
    recompute: tuple[Recompute | None, ...] = (None, "selective", "full")
    multiplexing: bool = True


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a plan is wanted for.

    Args:
        model: What is trained.
        cluster: On what; it has at least ``num_gpus``.
        num_gpus: GPUs of the run.
        global_batch_size: Samples of a step.
        settings: What the run does alike for all modules.
        pins: What is fixed.
        space: Where to look.
        reserved_bytes: Memory of a GPU that plans leave free, as ``RESERVED_BYTES`` says.

    Raises:
        PlanError: There are too few GPUs or samples, or the model is of no kind that is planned.
        LayoutError: The GPU cannot give the quotas that are fixed.
    """

    model: ModelSpec
    cluster: Cluster
    num_gpus: int
    global_batch_size: int
    settings: TrainingSettings = field(default_factory=TrainingSettings)
    pins: Pins = field(default_factory=Pins)
    space: Space = field(default_factory=Space)
    reserved_bytes: float = RESERVED_BYTES

    def __post_init__(self) -> None:
        if self.num_gpus < 1:
            raise PlanError(f"gpus={self.num_gpus} must be >= 1; give the GPUs of the run")
        if self.global_batch_size < 1:
            raise PlanError(
                f"global-batch-size={self.global_batch_size} must be >= 1; give samples of a step"
            )
        if self.num_gpus > self.cluster.num_gpus:
            raise PlanError(
                f"gpus={self.num_gpus} must be <= the {self.cluster.num_gpus} GPUs of cluster "
                f"{self.cluster.name}; lower it or add nodes to the cluster file"
            )
        _check_edges(self.model)
        _check_mask(self.model)
        _check_quotas(self.pins.quotas, self.cluster.gpu)

    @property
    def memory_bytes(self) -> float:
        """Memory of a GPU that a plan may fill."""
        return self.cluster.gpu.memory_bytes - self.reserved_bytes

    @cached_property
    def workload(self) -> Workload | None:
        """Sequences under a multimodal mask; ``None`` if the model's is causal."""
        return Workload.of(self.model)

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names of the modules beside the language model, sorted."""
        return tuple(sorted(name for name in self.model.modules if name != LANGUAGE))

    def num_microbatches(self, *, micro_batch_size: int, dp: int) -> int:
        """Microbatches of a step; 0 if the batch cannot be cut so."""
        samples = micro_batch_size * dp
        return 0 if self.global_batch_size % samples else self.global_batch_size // samples


def has_experts(module: ModuleSpec) -> bool:
    """Whether a layer of the module is a mixture of experts."""
    return any(isinstance(run.layer.mlp, Experts) for run in module.layers)


def _check_edges(model: ModelSpec) -> None:
    for source, destination in model.edges:
        if destination != LANGUAGE:
            raise PlanError(
                f"model {model.name}: edge=[{source}, {destination}] must end at language: plans "
                f"for other modules that take its rows are not searched yet; remove the edge, or "
                f"write the plan by hand"
            )


def _check_mask(model: ModelSpec) -> None:
    if Workload.of(model) is None:
        return
    language = model.language
    for run in language.layers:
        mixer = run.layer.mixer
        if not isinstance(mixer, SelfAttention) or mixer.window is not None:
            kind = "sliding windows" if isinstance(mixer, SelfAttention) else type(mixer).__name__
            raise PlanError(
                f"model {model.name}: mask={language.mask} must go with layers of full "
                f"self-attention, which {kind} are not; remove mask"
            )
    if isinstance(language.output, LanguageHead) and language.output.mtp_layers:
        raise PlanError(
            f"model {model.name}: mask={language.mask} must go with mtp_num_layers=0, not "
            f"{language.output.mtp_layers}; remove one of the two"
        )


def read_pins(written: Mapping[str, str], *, model: ModelSpec) -> Pins:
    """Reads what ``--set`` says.

    Args:
        written: Values as text by field, such as ``language.tensor_model_parallel_size``.
        model: Whose modules the fields name.

    Raises:
        PlanError: There is no such field, or the value cannot be.
    """
    modules: dict[str, dict[str, Any]] = {}
    quotas: dict[str, int | None] = {}
    rest: dict[str, Any] = {}
    for key, text in written.items():
        value = yaml.safe_load(text)
        name, _, size = key.partition(".")
        if name in model.modules and size == QUOTA:
            quotas[name] = None if value in (None, "none") else _count(key, value)
        elif name in model.modules and size:
            short = _size(key, size)
            modules.setdefault(name, {})[short] = _value(key, size, value)
            if size.startswith("attention.") and Workload.of(model) is None:
                raise PlanError(
                    f"set: {key} must go with a mask in model {model.name}, whose attention is "
                    f"causal; remove it, or add mask to the model"
                )
        else:
            field_name = _plan_field(key, model)
            rest[field_name] = _plan_value(key, value)
    return Pins(modules=modules, quotas=quotas, **_with_kind(rest, quotas))


def _check_quotas(quotas: Mapping[str, int | None], gpu: Gpu) -> None:
    """Checks that a GPU can give the quotas that are fixed; which it could else is not known."""
    if gpu.compute_capability is not None:
        split_for(
            list(quotas.values()),
            num_sms=gpu.num_sms,
            sizes=granularity(gpu.compute_capability),
            where=f"set: gpu {gpu.name}",
        )


def _with_kind(rest: Mapping[str, Any], quotas: Mapping[str, int | None]) -> Mapping[str, Any]:
    """Pins the schedule that quotas go with."""
    name = next((name for name, sms in quotas.items() if sms is not None), None)
    if name is None:
        return rest
    kind = rest.get("kind", "concurrent")
    if kind != "concurrent":
        raise PlanError(
            f"set: {name}.{QUOTA}={quotas[name]} must go with schedule.kind=concurrent, not "
            f"{kind}; remove one of the two"
        )
    return {**rest, "kind": kind}


def _size(key: str, size: str) -> str:
    if size not in _SIZES:
        known = (*_SIZES, QUOTA)
        advice = nearest(size, known, otherwise="choose one of them")
        raise PlanError(f"set: {key} must name one of {', '.join(known)}; {advice}")
    return _SIZES[size]


def _value(key: str, size: str, value: object) -> object:
    if size == "recompute":
        kinds = (None, *get_args(Recompute))
        value = None if value == "none" else value
        if value not in kinds:
            raise PlanError(
                f"set: {key}={show(value)} must be one of none, selective, full; choose one of them"
            )
        return value
    if _SIZES[size] in _WORDS:
        return _word(key, size, value)
    if size == "sequence_parallel":
        if not isinstance(value, bool):
            raise PlanError(f"set: {key}={show(value)} must be a boolean; write true or false")
        return value
    if size == "layers_per_stage":
        if not isinstance(value, list) or not all(type(n) is int and n > 0 for n in value):
            raise PlanError(f"set: {key}={show(value)} must be a list of layers; write [17, 15]")
        return tuple(value)
    return _count(key, value)


def _word(key: str, size: str, value: object) -> object:
    is_language, words = key.partition(".")[0] == LANGUAGE, _WORDS[_SIZES[size]]
    if is_language == (size == "items"):
        where = "an encoder" if size == "items" else LANGUAGE
        raise PlanError(f"set: {key} must be a field of {where}; remove it")
    if value not in words:
        raise PlanError(
            f"set: {key}={show(value)} must be one of {', '.join(words)}; "
            f"{nearest(value, words, otherwise='choose one of them')}"
        )
    return value


def _count(key: str, value: object) -> int:
    if type(value) is not int or value < 1:
        raise PlanError(f"set: {key}={show(value)} must be an integer >= 1; write a whole number")
    return value


def _plan_field(key: str, model: ModelSpec) -> str:
    known = {
        "micro_batch_size": "micro_batch_size",
        "schedule.kind": "kind",
        "schedule.encoder_group": "encoder_group",
        "placement": "placement",
    }
    if key not in known:
        sizes = (*_SIZES, QUOTA)
        names = [*known, *(f"{name}.{size}" for name in model.modules for size in sizes)]
        advice = nearest(key, names, otherwise=f"write for example language.{next(iter(_SIZES))}=2")
        raise PlanError(f"set: {key} must be a field of the plan; {advice}")
    return known[key]


def _plan_value(key: str, value: object) -> object:
    choices = {"schedule.kind": get_args(ScheduleKind), "placement": PLACEMENTS}.get(key)
    if choices is None:
        return _count(key, value)
    if value not in choices:
        raise PlanError(
            f"set: {key}={show(value)} must be one of {', '.join(choices)}; "
            f"{nearest(value, choices, otherwise='choose one of them')}"
        )
    return value
