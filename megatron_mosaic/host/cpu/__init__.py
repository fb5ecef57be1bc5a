"""Runs stock Megatron-Core and ``pretrain()`` on CPU with gloo.

Importing this package imports neither torch nor megatron and changes nothing: a process runs on
its GPU until it calls ``run_on_cpu``.
"""

from megatron_mosaic.host.cpu.switch import cpu_wanted, run_on_cpu

__all__ = ["cpu_wanted", "run_on_cpu"]
