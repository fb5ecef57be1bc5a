"""Imported once by the process that rank processes are forked from.

Importing torch and Megatron takes seconds, a fork milliseconds. Nothing here may run autograd or
start a thread: a forked rank would inherit the locks without the threads.
"""

import argparse
import gc
import importlib
import os
import traceback
import warnings

import torch

TORCH = (
    "numpy",
    "torch._dynamo",  # torch imports it late, for instance to warn of a deprecated function
    "torch.distributed.checkpoint",
    "torch.testing",
    "torch.utils.checkpoint",
)
MEGATRON = (
    "megatron.core.dist_checkpointing",
    "megatron.core.distributed",
    "megatron.core.models.gpt",
    "megatron.core.models.multimodal.llava_model",
    "megatron.core.optimizer",
    "megatron.core.parallel_state",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.training.training",
)
MOSAIC = (
    "megatron_mosaic.comm.replay",
    "megatron_mosaic.host.arguments",
    "megatron_mosaic.host.training",
    "megatron_mosaic.rehearsal.job",
    "megatron_mosaic.rehearsal.llava_script",
    "megatron_mosaic.rehearsal.mimo_script",
)


def _preload() -> None:
    for name in TORCH:
        importlib.import_module(name)
    if os.environ.get("MOSAIC_RANKS_WITHOUT_MEGATRON") == "1":
        return
    from megatron_mosaic.host.cpu import run_on_cpu

    run_on_cpu()
    for name in MEGATRON + MOSAIC:
        importlib.import_module(name)
    _read_help_once()


def _read_help_once() -> None:
    """Keeps the help texts of options: Megatron parses the source of its classes for them.

    A rank would do that twice, for a tenth of a second each time.
    """
    from megatron.training.argument_utils import ArgumentGroupFactory
    from megatron.training.arguments import add_megatron_arguments

    texts: dict[type, dict[str, str]] = {}
    read = ArgumentGroupFactory._get_field_docstrings

    def read_once(factory: ArgumentGroupFactory, source: type) -> dict[str, str]:
        if source not in texts:
            texts[source] = read(factory, source)
        return texts[source]

    ArgumentGroupFactory._get_field_docstrings = read_once
    add_megatron_arguments(argparse.ArgumentParser())


torch.set_num_threads(1)
with warnings.catch_warnings():
    # The host warns about each optional package that is absent.
    warnings.simplefilter("ignore")
    try:
        _preload()
    except Exception:  # noqa: BLE001 - the server swallows it; ranks would be slow without a word
        traceback.print_exc()
# What is here stays: ranks need not look through it for garbage, which would copy its pages.
gc.freeze()
