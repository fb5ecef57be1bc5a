"""Steps captured as CUDA graphs: what the host takes to launch them plays no part."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.sharing.setting import synchronize
from megatron_mosaic.errors import HostError


class Captures:
    """Captures what runs one after the other and leaves nothing behind: in one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def captured(self, run: Callable[[], None]) -> Callable[[], None]:
        """Returns what replays a run, whose lanes begin and end in the current stream.

        Raises:
            HostError: The device is no GPU.
        """
        if self._device.type != "cuda":
            raise HostError(f"device={self._device} must be a GPU to capture a step")
        for _ in range(2):  # what is made on first use may not be captured
            run()
        synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=torch.cuda.current_stream()):
            run()
        self._pool = graph.pool()
        return graph.replay
