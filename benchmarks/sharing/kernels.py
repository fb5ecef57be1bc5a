"""Kernels that say where they ran, and spin for a known time.

Triton comes with torch on a GPU and not on a host: only what has a device imports this module.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer, smid


@triton.jit
def _spin_kernel(ids, duration_ns):  # noqa: ANN001, ANN202 - Triton's own types
    """Writes the block's SM, and stays there until ``duration_ns`` have gone by."""
    block = tl.program_id(0)
    start = globaltimer()
    now = start
    while now - start < duration_ns:
        now = globaltimer()
    tl.store(ids + block, smid())


class Spin:
    """Blocks that spin, and what they wrote.

    Args:
        blocks: Blocks; those of more than all SMs can hold wait for the first ones.
        device: Where.
    """

    def __init__(self, blocks: int, device: torch.device) -> None:
        self._blocks = blocks
        self._ids = torch.full((blocks,), -1, dtype=torch.int32, device=device)

    def launch(self, duration_s: float) -> None:
        """Launches all blocks in the current stream."""
        launch: Any = _spin_kernel
        launch[(self._blocks,)](self._ids, int(duration_s * 1e9), num_warps=1)

    def sms(self) -> list[int]:
        """SMs that blocks were on, ascending; the launch must have ended."""
        return sorted(set(self._ids.tolist()))
