"""Two runs, tensor by tensor: see ``megatron_mosaic.rehearsal.compare``."""

from megatron_mosaic.rehearsal.compare import Comparison, Whole, compare, whole

__all__ = ["Comparison", "Whole", "compare", "whole"]
