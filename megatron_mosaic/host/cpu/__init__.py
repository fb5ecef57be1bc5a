"""Runs stock Megatron-Core and ``pretrain()`` on CPU with gloo, so that a layout can be tried anywhere.

Importing this package imports neither torch nor megatron and changes nothing.
"""

from megatron_mosaic.host.cpu.switch import cpu_wanted, run_on_cpu

__all__ = ["cpu_wanted", "run_on_cpu"]
