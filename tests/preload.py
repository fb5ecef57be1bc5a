"""Imported once by the process that rank processes are forked from.

Importing torch and Megatron takes seconds, a fork milliseconds. Nothing here may run autograd or
start a thread: a forked rank would inherit the locks without the threads.
"""

import importlib
import os
import traceback
import warnings

import torch

TORCH = (
    "numpy",
    "pytest",
    "hypothesis",
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


def _preload() -> None:
    for name in TORCH:
        importlib.import_module(name)
    if os.environ.get("MOSAIC_RANKS_WITHOUT_MEGATRON") == "1":
        return
    from megatron_mosaic.host.cpu import run_on_cpu

    run_on_cpu()
    for name in MEGATRON:
        importlib.import_module(name)


torch.set_num_threads(1)
with warnings.catch_warnings():
    # The host warns about each optional package that is absent.
    warnings.simplefilter("ignore")
    try:
        _preload()
    except Exception:  # noqa: BLE001 - the server swallows it; ranks would be slow without a word
        traceback.print_exc()
