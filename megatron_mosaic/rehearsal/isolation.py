"""Several runs in one process: what each leaves, and the lanes it launches in."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def forget_run() -> None:
    """Leaves nothing of a run that another one in this process would meet."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.training.global_vars import destroy_global_vars

    destroy_global_vars()
    destroy_num_microbatches_calculator()
    destroy_rerun_state_machine()
    parallel_state.destroy_global_memory_buffer()
    dist.destroy_process_group()


@contextmanager
def lanes_noted() -> Iterator[Callable[[], str]]:
    """Gives a function that tells in which lane this rank launches."""
    from megatron_mosaic.sharing.virtual import VirtualLane

    lanes = [""]
    active = VirtualLane.active

    @contextmanager
    def noted(self: Any, *, whole: bool = False) -> Iterator[None]:
        lanes.append(self.name)
        try:
            with active(self, whole=whole):
                yield
        finally:
            lanes.pop()

    VirtualLane.active = noted
    try:
        yield lambda: lanes[-1]
    finally:
        VirtualLane.active = active
