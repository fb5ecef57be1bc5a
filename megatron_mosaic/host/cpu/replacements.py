"""Everything that a run on CPU replaces in torch and in Megatron, one row each."""

import importlib
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from megatron_mosaic.host.cpu import collectives, devices, generators


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


_NO_DEVICE = "there is no CUDA device to ask or to set"
_FACTORY = 'upstream allocates with device="cuda" or a device index'

TORCH_REPLACEMENTS = (
    Replacement("torch.compile", devices.not_compiled, "compiles upstream at import"),
    # Where tensors live.
    *(Replacement(f"torch.{n}", devices.device_translated, _FACTORY) for n in devices.FACTORIES),
    *(
        Replacement(f"torch.Tensor.{name}", devices.device_translated, _FACTORY)
        for name in devices.FACTORY_METHODS
    ),
    Replacement("torch.Tensor.to", devices.first_device_translated, _FACTORY),
    Replacement("torch.Tensor.cuda", devices.itself, _FACTORY),
    Replacement("torch.Tensor.pin_memory", devices.itself, "pinning is CUDA's"),
    Replacement("torch.Tensor.record_stream", devices.answering(None), "no streams"),
    Replacement("torch.Tensor.type", devices.type_name_of_cuda, "optimizers compare type names"),
    Replacement("torch.load", devices.map_location_translated, "checkpoints name CUDA devices"),
    Replacement(
        "torch.utils._device.DeviceContext.__init__",
        devices.first_device_translated,
        "with torch.device(index): allocates on CUDA",
    ),
    # The device.
    Replacement("torch.cuda.is_available", devices.answering(False), "a GPU that is not wanted"),
    Replacement("torch.cuda.current_device", devices.answering(0), _NO_DEVICE),
    Replacement("torch.cuda.device_count", devices.answering(1), "no seeding, no groups without"),
    Replacement("torch.cuda.set_device", devices.answering(None), _NO_DEVICE),
    Replacement("torch.cuda.device", devices.null_context, _NO_DEVICE),
    Replacement("torch.cuda.synchronize", devices.answering(None), _NO_DEVICE),
    Replacement(
        "torch.cuda.get_device_capability", devices.answering(devices.CAPABILITY), _NO_DEVICE
    ),
    Replacement(
        "torch.cuda.get_device_properties", devices.answering(devices.PROPERTIES), _NO_DEVICE
    ),
    Replacement("torch.cuda._lazy_init", devices.answering(None), _NO_DEVICE),
    Replacement("torch.cuda._lazy_call", always(generators.call_now), "calls queue for ever"),
    Replacement("torch.cuda.memory_stats", devices.no_memory_stats, "missing entries"),
    Replacement("torch.cuda.reset_peak_memory_stats", devices.answering(None), _NO_DEVICE),
    Replacement("torch.cuda.device_memory_used", devices.answering(0), _NO_DEVICE),
    # Streams and events.
    Replacement("torch.cuda.Stream", always(devices.NullStream), "no streams"),
    Replacement("torch.cuda.ExternalStream", always(devices.NullStream), "no streams"),
    Replacement("torch.cuda.Event", always(devices.NullEvent), "no streams"),
    Replacement("torch.cuda.stream", devices.null_context, "no streams"),
    Replacement("torch.cuda.current_stream", devices.answering(devices.NullStream()), "no streams"),
    Replacement("torch.cuda.default_stream", devices.answering(devices.NullStream()), "no streams"),
    Replacement("torch.cuda.set_stream", devices.answering(None), "no streams"),
    Replacement("torch.cuda.is_current_stream_capturing", devices.answering(False), "no streams"),
    Replacement("torch.cuda.nvtx.range_push", devices.answering(None), "NVTX may be missing"),
    Replacement("torch.cuda.nvtx.range_pop", devices.answering(None), "NVTX may be missing"),
    # Random numbers.
    Replacement("torch.cuda.get_rng_state", always(generators.get_state), _NO_DEVICE),
    Replacement("torch.cuda.set_rng_state", always(generators.set_state), _NO_DEVICE),
    Replacement("torch.cuda.random.get_rng_state", always(generators.get_state), _NO_DEVICE),
    Replacement("torch.cuda.random.set_rng_state", always(generators.set_state), _NO_DEVICE),
    Replacement("torch.cuda.manual_seed", always(generators.seed_device), _NO_DEVICE),
    Replacement("torch.cuda.manual_seed_all", always(generators.seed_device), _NO_DEVICE),
    Replacement("torch.cuda.default_generators", generators.only_generator, _NO_DEVICE),
    *(
        Replacement(
            f"torch.utils.data.dataloader._BaseDataLoaderIter.{name}",
            generators.drawn_from_own_state,
            "only some tensor-parallel ranks load data, and all must drop out alike",
        )
        for name in ("__init__", "__next__")
    ),
    # Communication.
    *(
        Replacement(f"{module}.{name}", collectives.gloo_backed, "NCCL needs GPUs")
        for module in ("torch.distributed", "torch.distributed.distributed_c10d")
        for name in ("init_process_group", "new_group")
    ),
    Replacement("torch.distributed.barrier", collectives.without_device_ids, "they name GPUs"),
    Replacement(
        "torch.distributed.all_to_all_single",
        collectives.split_sizes_listed,
        "MoE passes tensors unless they are on CUDA",
    ),
)


def megatron_replacements() -> tuple[Replacement, ...]:
    """Rows for Megatron itself. Imports it."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from megatron_mosaic.host.cpu import upstream
    from megatron_mosaic.host.cpu.optimizer import FusedAdam, without_gradients

    initialize = "initialize_megatron"
    no_te = "without TransformerEngine: "
    core = "megatron.core"
    return (
        *(
            Replacement(f"{module}.{initialize}", upstream.without_cuda, "asserts a GPU")
            for module in (
                "megatron.training",
                "megatron.training.initialize",
                "megatron.training.training",
            )
        ),
        Replacement(
            f"{core}.datasets.utils.compile_helpers", upstream.if_not_compiled, "wheel: no Makefile"
        ),
        Replacement(
            f"{core}.fusions.fused_softmax.FusedScaleMaskSoftmax.is_kernel_available",
            devices.answering(False),
            "bf16 takes a CUDA extension",
        ),
        # Norms and attention of local layer specs.
        Replacement(
            f"{core}.transformer.torch_norm.WrappedTorchNorm.__new__",
            always(upstream.local_norm),
            no_te + "refuses sequence parallelism and persistent kernels",
        ),
        Replacement(
            f"{core}.models.vision.clip_vit_model.CLIPViTModel.__init__",
            upstream.with_local_norm,
            no_te + "the default norm is called with an argument it does not have",
        ),
        Replacement(
            f"{core}.models.multimodal.llava_model.TEDotProductAttention",
            always(DotProductAttention),
            no_te + "LLaVAModel refuses sequence parallelism",
        ),
        Replacement(
            f"{core}.models.multimodal.llava_model.HAVE_TE",
            always(True),
            no_te + "LLaVAModel refuses sequence parallelism",
        ),
        Replacement(
            f"{core}.transformer.dot_product_attention.DotProductAttention.__init__",
            upstream.with_padding_at_the_end,
            "a padded causal mask would mask nothing",
        ),
        Replacement(
            f"{core}.transformer.dot_product_attention.DotProductAttention.forward",
            upstream.with_unpacked_sequences,
            "scripts describe unpacked sequences too",
        ),
        # Optimizer.
        Replacement(f"{core}.optimizer.Adam", always(FusedAdam), "resume: torch's has other steps"),
        Replacement(f"{core}.optimizer.USING_PYTORCH_OPTIMIZER", always(False), "selects Adam"),
        Replacement(f"{core}.optimizer.distrib_optimizer.Adam", always(FusedAdam), "as above"),
        Replacement(
            f"{core}.optimizer.distrib_optimizer.HAVE_APEX_OR_TE", always(True), "as above"
        ),
        Replacement(
            f"{core}.optimizer.distrib_optimizer.USING_APEX_OPTIMIZER", always(True), "as above"
        ),
        Replacement(
            f"{core}.optimizer.distrib_optimizer.DistributedOptimizer.load_state_dict",
            without_gradients,
            "resume in fp32: copies into a view of a leaf parameter",
        ),
    )


def is_applied() -> bool:
    """Whether this process already runs on CPU."""
    import torch

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
