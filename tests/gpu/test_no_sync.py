"""Between two layouts nothing waits for the device: torch raises where something would."""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False"
)


def test_exchange_does_not_wait_for_the_device():
    assert run_ranks(_exchange, 1, init=False, fresh=True, timeout_s=120) == [True]


def test_merge_of_image_rows_does_not_wait_for_the_device():
    assert run_ranks(_merge, 1, init=False, fresh=True, timeout_s=120) == [True]


def test_a_read_of_a_value_does_wait_for_the_device():
    assert run_ranks(_read, 1, init=False, fresh=True, timeout_s=120) == [True]


@contextmanager
def _no_waiting():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _exchange(rank: int) -> bool:
    """Both directions over NCCL, of three samples of which one is left out, on one rank."""
    import torch.distributed as dist

    from megatron_mosaic.comm.boundary import BoundaryRoutes, BoundaryShape
    from megatron_mosaic.comm.exchange import Exchange
    from megatron_mosaic.comm.groups import warm_up
    from megatron_mosaic.layout.placement import ModulePlacement
    from megatron_mosaic.layout.rows import Interval

    torch.cuda.set_device(0)
    device = torch.device("cuda", 0)
    dist.init_process_group("nccl", device_id=device)
    group = dist.group.WORLD
    assert group is not None
    warm_up(group, device=device)
    routes = BoundaryRoutes(
        ModulePlacement(name="vision", ranks=(0,)),
        ModulePlacement(name="language", ranks=(0,)),
        shape=BoundaryShape(samples_per_replica=3),
    )
    routes.begin(((Interval(0, 4),), (), (Interval(2, 5),)), groups=[(0,)])
    exchange = Exchange(
        group=group, gather_group=None, hidden_size=8, dtype=torch.bfloat16, device=device
    )
    rows = torch.randn(7, 8, dtype=torch.bfloat16, device=device)
    with _no_waiting():
        kept = exchange.post(routes.route("activation", 0, rank=0), rows).wait()
        gradient = exchange.post(routes.route("gradient", 0, rank=0), kept).wait()
    return torch.equal(kept, rows) and torch.equal(gradient, rows)


def _merge(rank: int) -> bool:
    """A context-parallel rank's merge, the first with its tables and the next from the cache."""
    from megatron_mosaic.host.families.llava_sequence import SequenceMerge
    from megatron_mosaic.host.sequence_parts import ZigzagParts
    from megatron_mosaic.layout.placement import Coordinates
    from megatron_mosaic.layout.rows import Interval
    from megatron_mosaic.layout.sequences import SampleSequence
    from megatron_mosaic.layout.sharding import SequenceSharding

    config: Any = SimpleNamespace(sequence_parallel=False, context_parallel_size=2)
    groups: Any = SimpleNamespace(position=Coordinates(0, 0, 0, 0))
    model: Any = SimpleNamespace()
    parts = ZigzagParts(SequenceSharding(sequence_length=8, cp=2), groups)
    merge = SequenceMerge(model, config=config, parts=parts, groups=groups)
    merge.take((SampleSequence((Interval(1, 5),)),))
    # Positions 0, 1, 6 and 7 are this rank's; the image has rows at 1-4, text tokens the rest.
    text = torch.arange(5.0, device="cuda").view(1, 5, 1)
    rows = torch.full((1, 1), 10.0, device="cuda")
    for _ in range(2):
        with _no_waiting():
            merged = merge._merge(rows, text)
    return merged.flatten().tolist() == [0.0, 10.0, 3.0, 4.0]


def _read(rank: int) -> bool:
    try:
        with _no_waiting():
            torch.ones(1, device="cuda").item()
    except RuntimeError:
        return True
    return False
