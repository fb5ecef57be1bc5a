"""No code between two layouts reads activations on the host, which on a GPU would wait for it."""

from pathlib import Path

import pytest
import torch

from tests.host_reads import host_reads
from tests.parity.record import OPTIMIZERS, record_plan
from tests.ranks import run_ranks

PLANS = Path(__file__).parent.parent / "plans"
# Where rows are gathered, where they are merged into parts of sequences.
# Not merged in the first: there every rank keeps whole sequences.
WATCHED = ("disjoint_vtp2_ltp2pp2", "colocated_sequence_parallel", "language_cp2_tp2_sp")


@pytest.mark.parametrize(
    "read",
    [
        lambda tensor: tensor.sum().item(),
        lambda tensor: tensor.tolist(),
        lambda tensor: tensor.cpu(),
        lambda tensor: tensor.nonzero(),
        lambda tensor: torch.nonzero(tensor),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: bool(tensor.sum()),
        lambda tensor: torch.masked_select(tensor, tensor > 0),
    ],
)
def test_a_read_on_the_host_is_noted(read):
    with host_reads() as found:
        read(torch.tensor([0.0, 1.0]))

    assert found


def test_slices_copies_and_sums_are_not_noted():
    tensor = torch.arange(6.0).view(3, 2)

    with host_reads() as found:
        parts = torch.cat([tensor[1:], tensor[:1]]).split([1, 2])
        total = tensor.new_zeros(3, 2)
        total[0:1] += parts[0]
        total.index_copy(0, torch.tensor([2]), parts[0]).index_select(0, torch.tensor([0]))

    assert found == []


@pytest.mark.parametrize("plan", WATCHED)
def test_boundaries_read_nothing_on_the_host(plan):
    path = PLANS / f"{plan}.yaml"
    world_size = int(path.read_text().partition("world_size: ")[2].split()[0])

    outcomes = run_ranks(_watch, world_size, str(path), init=False, timeout_s=120)

    assert [found for found, _ in outcomes] == [[]] * world_size
    seen = {kind for _, calls in outcomes for kind, times in calls.items() if times}
    assert seen == {"post", "wait"} | ({"merge"} if plan != WATCHED[0] else set())


def _watch(rank: int, plan: str) -> tuple[list[str], dict[str, int]]:
    """Trains under a plan, with an eye on what boundaries and merges do."""
    from megatron_mosaic.comm.exchange import Exchange, PendingExchange
    from megatron_mosaic.host.families.llava_sequence import SequenceMerge

    reads: list[str] = []
    calls = {"post": 0, "wait": 0, "merge": 0}

    def watched(kind, method):
        def call(*arguments):
            calls[kind] += 1
            with host_reads() as found:
                result = method(*arguments)
            reads.extend(f"{kind}: {name}" for name in found)
            return result

        return call

    Exchange.post = watched("post", Exchange.post)
    PendingExchange.wait = watched("wait", PendingExchange.wait)
    SequenceMerge._merge = watched("merge", SequenceMerge._merge)
    record_plan(rank, plan, [*OPTIMIZERS["sgd"], "--images", "ragged"])
    return reads, calls
