"""Whether a process runs on CPU, and the switch."""

import sys


def cpu_wanted(device: str | None) -> bool:
    """Whether this process has to call ``run_on_cpu``.

    Args:
        device: What the user asked for, ``"cpu"`` or ``"cuda"``; ``None`` is the CPU if there is
            no GPU.
    """
    if device is not None:
        return device == "cpu"
    import torch

    return not torch.cuda.is_available()


def run_on_cpu() -> None:
    """Makes torch and Megatron use the CPU and gloo where they name CUDA and NCCL.

    Call it once at start, before anything of megatron is imported: upstream copies several torch
    functions into its modules. A second call changes nothing. It cannot be undone.

    Note:
        Imports ``megatron.training``. It emulates the logic of a run, not CUDA's stream order nor
        NCCL's behaviour.
    """
    from megatron_mosaic.host.cpu import generators, replacements

    if replacements.is_applied():
        return
    imported_early = "megatron.core" in sys.modules
    pairs = replacements.apply(replacements.TORCH_REPLACEMENTS)
    if imported_early:
        replacements.rebind_in_megatron(pairs)
        _stop_compiling()
    replacements.apply(replacements.megatron_replacements())
    generators.silence_comparison()


def _stop_compiling() -> None:
    """Lets functions that megatron has already handed to the compiler run as they are."""
    import torch._dynamo

    torch._dynamo.config.disable = True
