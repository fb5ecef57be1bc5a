"""Parts of ``benchmarks.sharing_gpu``: what modules gain and lose when they share a GPU."""
