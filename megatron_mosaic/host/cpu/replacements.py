"""Everything that a run on CPU replaces in torch and in Megatron, one row each."""

import importlib
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from megatron_mosaic.host.cpu import collectives, devices, generators, optimizer


class Replacement(NamedTuple):
    """One attribute of torch or megatron.

    Args:
        target: Dotted path.
        make: Computes the new value from the old one.
        why: What goes wrong without it.
    """

    target: str
    make: Callable[[Any], Any]
    why: str


def always(value: Any) -> Callable[[Any], Any]:
    """Makes a new value that does not depend on the old one."""
    return lambda original: value


TORCH_REPLACEMENTS = (
    Replacement("torch.compile", devices.not_compiled, "compiles functions at import"),
    # Where tensors live: upstream allocates with device="cuda" or with a device index.
    *(
        Replacement(f"torch.{name}", devices.device_translated, "allocates on CUDA")
        for name in devices.FACTORIES
    ),
    *(
        Replacement(f"torch.Tensor.{name}", devices.device_translated, "allocates on CUDA")
        for name in devices.FACTORY_METHODS
    ),
    Replacement("torch.Tensor.to", devices.first_device_translated, "copies to CUDA"),
    Replacement("torch.Tensor.cuda", devices.itself, "copies to CUDA"),
    Replacement("torch.Tensor.pin_memory", devices.itself, "pins memory for CUDA"),
    Replacement("torch.Tensor.record_stream", devices.answering(None), "knows CUDA tensors only"),
    Replacement("torch.Tensor.type", devices.type_name_of_cuda, "optimizers compare type names"),
    Replacement("torch.load", devices.map_location_translated, "restores to CUDA"),
    Replacement(
        "torch.utils._device.DeviceContext.__init__",
        devices.first_device_translated,
        "with torch.device(index): allocates on CUDA",
    ),
    # The device. The driver is asked, or initialised.
    Replacement("torch.cuda.is_available", devices.answering(False), "a GPU nobody asked for"),
    Replacement("torch.cuda.current_device", devices.answering(0), "asks the driver"),
    Replacement("torch.cuda.device_count", devices.answering(1), "0: no groups, no seeds"),
    Replacement("torch.cuda.set_device", devices.answering(None), "asks the driver"),
    Replacement("torch.cuda.device", devices.null_context, "asks the driver"),
    Replacement("torch.cuda.synchronize", devices.answering(None), "asks the driver"),
    Replacement(
        "torch.cuda.get_device_capability",
        devices.answering(devices.CAPABILITY),
        "asks the driver",
    ),
    Replacement(
        "torch.cuda.get_device_properties",
        devices.answering(devices.PROPERTIES),
        "asks the driver",
    ),
    Replacement("torch.cuda._lazy_init", devices.answering(None), "initialises CUDA"),
    Replacement("torch.cuda._lazy_call", generators.calling_now, "queues until CUDA is there"),
    Replacement("torch.cuda.memory_stats", devices.no_memory_stats, "has no entries"),
    Replacement("torch.cuda.reset_peak_memory_stats", devices.answering(None), "asks the driver"),
    Replacement("torch.cuda.device_memory_used", devices.answering(0), "asks the driver"),
    # Streams and events: there is one order of execution.
    Replacement("torch.cuda.Stream", always(devices.NullStream), "asks the driver"),
    Replacement("torch.cuda.ExternalStream", always(devices.NullStream), "asks the driver"),
    Replacement("torch.cuda.Event", always(devices.NullEvent), "asks the driver"),
    Replacement("torch.cuda.stream", devices.null_context, "asks the driver"),
    Replacement(
        "torch.cuda.current_stream", devices.answering(devices.NullStream()), "asks the driver"
    ),
    Replacement(
        "torch.cuda.default_stream", devices.answering(devices.NullStream()), "asks the driver"
    ),
    Replacement("torch.cuda.set_stream", devices.answering(None), "asks the driver"),
    Replacement(
        "torch.cuda.is_current_stream_capturing", devices.answering(False), "asks the driver"
    ),
    Replacement("torch.cuda.nvtx.range_push", devices.answering(None), "NVTX may be missing"),
    Replacement("torch.cuda.nvtx.range_pop", devices.answering(None), "NVTX may be missing"),
    # Random numbers.
    Replacement("torch.cuda.get_rng_state", generators.getting_state, "asks the driver"),
    Replacement("torch.cuda.set_rng_state", generators.setting_state, "asks the driver"),
    Replacement("torch.cuda.random.get_rng_state", generators.getting_state, "asks the driver"),
    Replacement("torch.cuda.random.set_rng_state", generators.setting_state, "asks the driver"),
    Replacement("torch.cuda.manual_seed", generators.seeding, "asks the driver"),
    Replacement("torch.cuda.manual_seed_all", generators.seeding, "asks the driver"),
    Replacement("torch.cuda.default_generators", generators.only_generator, "is empty"),
    Replacement(
        "torch.utils.data.dataloader._BaseDataLoaderIter.__init__",
        generators.drawn_from_own_state,
        "tensor-parallel ranks without a loader would drop out differently",
    ),
    Replacement(
        "torch.utils.data.dataloader._BaseDataLoaderIter.__next__",
        generators.drawn_from_own_state,
        "as above",
    ),
    # Communication.
    Replacement("torch.distributed.init_process_group", collectives.gloo_backed, "asks for NCCL"),
    Replacement("torch.distributed.new_group", collectives.gloo_backed, "asks for NCCL"),
    Replacement(
        "torch.distributed.distributed_c10d.init_process_group",
        collectives.gloo_backed,
        "the same, for torch's own callers",
    ),
    Replacement(
        "torch.distributed.distributed_c10d.new_group",
        collectives.gloo_backed,
        "the same, for torch's own callers",
    ),
    Replacement("torch.distributed.barrier", collectives.without_device_ids, "names a GPU"),
    Replacement(
        "torch.distributed.all_to_all_single",
        collectives.split_sizes_listed,
        "MoE turns split sizes into lists only if they are on CUDA",
    ),
    Replacement(
        "torch.distributed.all_gather", collectives.uneven_gathered, "gloo gathers equal parts only"
    ),
    Replacement(
        "torch.distributed.reduce_scatter",
        collectives.uneven_scattered,
        "gloo scatters equal parts only",
    ),
)


def megatron_replacements() -> tuple[Replacement, ...]:
    """Rows for Megatron itself. Imports it, which has to wait for the rows for torch."""
    return (*_set_up(), *wheel_replacements(), *layer_replacements(), *adam_replacements())


def _set_up() -> tuple[Replacement, ...]:
    from megatron_mosaic.host.cpu import upstream

    return (
        Replacement("megatron.training.initialize_megatron", upstream.without_cuda, "asserts CUDA"),
        Replacement(
            "megatron.training.initialize.initialize_megatron",
            upstream.without_cuda,
            "the same, where it is defined",
        ),
        Replacement(
            "megatron.training.training.initialize_megatron",
            upstream.without_cuda,
            "the same, where pretrain() calls it",
        ),
    )


def wheel_replacements() -> tuple[Replacement, ...]:
    """Rows for a Megatron that is installed as a wheel; a GPU changes nothing about them."""
    from megatron_mosaic.host.cpu import upstream

    return (
        Replacement(
            "megatron.core.datasets.utils.compile_helpers",
            upstream.if_not_compiled,
            "the wheel holds the compiled helpers, and no Makefile",
        ),
    )


def layer_replacements() -> tuple[Replacement, ...]:
    """Rows for local layer specs, where neither TransformerEngine nor Apex is installed.

    The CPU never has them; a GPU without them needs the same rows.
    """
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from megatron_mosaic.host.cpu import upstream

    return (
        Replacement(
            "megatron.core.transformer.torch_norm.WrappedTorchNorm.__new__",
            always(upstream.local_norm),
            "refuses sequence parallelism and persist_layer_norm; many specs hold it",
        ),
        Replacement(
            "megatron.core.models.vision.clip_vit_model.CLIPViTModel.__init__",
            upstream.with_local_norm,
            "the default norm is called with an argument that it does not have",
        ),
        Replacement(
            "megatron.core.models.multimodal.llava_model.TEDotProductAttention",
            always(DotProductAttention),
            "LLaVAModel refuses sequence parallelism with another attention",
        ),
        Replacement(
            "megatron.core.models.multimodal.llava_model.HAVE_TE",
            always(True),
            "the same; nothing else reads it",
        ),
        Replacement(
            "megatron.core.transformer.dot_product_attention.DotProductAttention.__init__",
            upstream.with_padding_at_the_end,
            "a padded causal mask would mask nothing",
        ),
        Replacement(
            "megatron.core.transformer.dot_product_attention.DotProductAttention.forward",
            upstream.with_unpacked_sequences,
            "refuses the description of unpacked sequences",
        ),
        Replacement(
            "megatron.core.fusions.fused_softmax.FusedScaleMaskSoftmax.is_kernel_available",
            devices.answering(False),
            "bf16 takes a CUDA extension",
        ),
    )


def adam_replacements() -> tuple[Replacement, ...]:
    """Rows for an Adam like Apex's and TransformerEngine's, where neither is installed."""
    return (
        Replacement(
            "megatron.core.optimizer.Adam",
            always(optimizer.FusedAdam),
            "with torch's the distributed optimizer saves, and cannot resume",
        ),
        Replacement("megatron.core.optimizer.USING_PYTORCH_OPTIMIZER", always(False), "as above"),
        Replacement(
            "megatron.core.optimizer.distrib_optimizer.Adam",
            always(optimizer.FusedAdam),
            "as above",
        ),
        Replacement(
            "megatron.core.optimizer.distrib_optimizer.HAVE_APEX_OR_TE", always(True), "as above"
        ),
        Replacement(
            "megatron.core.optimizer.distrib_optimizer.USING_APEX_OPTIMIZER",
            always(True),
            "as above",
        ),
        Replacement(
            "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.load_state_dict",
            optimizer.without_gradients,
            "in fp32 it copies into a view of a leaf parameter",
        ),
    )


def is_applied() -> bool:
    """Whether this process already runs on CPU."""
    return torch.cuda.current_device.__module__ == devices.__name__


def apply(rows: Iterable[Replacement]) -> list[tuple[Any, Any]]:
    """Replaces the attribute of every row.

    Returns:
        The old and the new value of each row.
    """
    pairs = []
    for row in rows:
        path, _, name = row.target.rpartition(".")
        owner = _find(path)
        old = getattr(owner, name)
        new = row.make(old)
        setattr(owner, name, new)
        pairs.append((old, new))
    return pairs


def rebind_in_megatron(pairs: Iterable[tuple[Any, Any]]) -> None:
    """Replaces values that modules of megatron copied from torch when they were imported."""
    new_by_old = {id(old): new for old, new in pairs}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "megatron":
            for attribute, value in list(vars(module).items()):
                if id(value) in new_by_old:
                    setattr(module, attribute, new_by_old[id(value)])


def _find(path: str) -> Any:
    """The module or class at a dotted path."""
    module, _, attribute = path.rpartition(".")
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        return getattr(importlib.import_module(module), attribute)
