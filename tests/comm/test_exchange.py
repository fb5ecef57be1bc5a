from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from megatron_mosaic.comm.exchange import Exchange
from megatron_mosaic.comm.groups import GroupFactory
from megatron_mosaic.comm.record import record
from megatron_mosaic.comm.replay import P2P, Issue, replay
from megatron_mosaic.comm.route import Route, gradient_route, route
from megatron_mosaic.comm.traffic import total_received_bytes
from megatron_mosaic.layout.ownership import Ownership, encoder_samples, kept, produced, row_offsets
from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.rows import Interval, Rows
from megatron_mosaic.layout.sharding import SequenceSharding
from tests.ranks import run_ranks

CPU = torch.device("cpu")
HIDDEN = 3
ROW_BYTES = HIDDEN * 4  # fp32


@dataclass(frozen=True, kw_only=True)
class Case:
    """A boundary, and the tokens of each sample of a group of microbatches."""

    source: ModulePlacement
    destination: ModulePlacement
    counts: tuple[int, ...]
    num_microbatches: int = 1
    sharding: SequenceSharding | None = None

    @property
    def num_samples(self) -> int:
        """Samples of one microbatch."""
        return len(self.counts) // self.num_microbatches

    def owners(self, microbatch: int) -> tuple[Ownership, Ownership]:
        first = microbatch * self.num_samples
        samples = Interval(first, first + self.num_samples)
        return (
            produced(
                self.source,
                offsets=row_offsets(self.counts[slice(*samples)]),
                microbatch=samples,
                group_size=len(self.counts),
            ),
            kept(
                self.destination,
                samples=[
                    (Interval(1, 1 + count),) for count in self.counts[samples.start : samples.stop]
                ],
                samples_per_replica=self.num_samples // self.destination.data_parallel_size,
                sharding=self.sharding,
            ),
        )

    def first_row(self, microbatch: int) -> int:
        return sum(self.counts[: microbatch * self.num_samples])


def _vision(*ranks, tp=1, dp=1, pp=1):
    return ModulePlacement(
        name="vision",
        ranks=ranks,
        tensor_model_parallel_size=tp,
        data_parallel_size=dp,
        pipeline_model_parallel_size=pp,
    )


def _language(*ranks, tp=1, cp=1, dp=1, pp=1):
    return ModulePlacement(
        name="language",
        ranks=ranks,
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        data_parallel_size=dp,
        pipeline_model_parallel_size=pp,
    )


CASES = {
    "one to one": Case(source=_vision(0), destination=_language(1), counts=(4,)),
    "equal ranks, equal layouts": Case(
        source=_vision(0, 1, 2, 3, tp=2, dp=2),
        destination=_language(0, 1, 2, 3, tp=2, dp=2),
        counts=(3, 5),
    ),
    "equal ranks, data-parallel to tensor-parallel": Case(
        source=_vision(0, 1, 2, 3, dp=4),
        destination=_language(0, 1, 2, 3, tp=2, dp=2),
        counts=(2, 3, 4, 1),
    ),
    "equal ranks, tensor-parallel to data-parallel": Case(
        source=_vision(0, 1, 2, 3, tp=4),
        destination=_language(0, 1, 2, 3, dp=4),
        counts=(2, 3, 4, 1),
    ),
    "disjoint, tensor-parallel to more replicas": Case(
        source=_vision(0, 1, tp=2), destination=_language(2, 3, 4, dp=3), counts=(4, 2, 3)
    ),
    "disjoint, tensor-parallel on both sides": Case(
        source=_vision(0, 1, tp=2), destination=_language(2, 3, 4, tp=3), counts=(7,)
    ),
    "disjoint, sizes that do not divide": Case(
        source=_vision(0, 1, 2, dp=3), destination=_language(3, 4, dp=2), counts=(5, 1, 2, 4)
    ),
    "overlapping ranks": Case(
        source=_vision(0, 1, 2, dp=3),
        destination=_language(1, 2, 3, 4, tp=2, dp=2),
        counts=(5, 1, 2, 4),
    ),
    "replicas of which one has the rows in the middle": Case(
        source=_vision(0, 1, 2, dp=3), destination=_language(1, 3, tp=2), counts=(3, 2, 4)
    ),
    "interleaved ranks": Case(
        source=_vision(0, 2, 4, dp=3), destination=_language(1, 3, tp=2), counts=(5, 6)
    ),
    "unordered ranks": Case(
        source=_vision(3, 1, tp=2), destination=_language(4, 0, 2, dp=3), counts=(2, 3, 4)
    ),
    "unordered replicas": Case(
        source=_vision(0), destination=_language(4, 2, 3, tp=3), counts=(8,)
    ),
    "samples without tokens": Case(
        source=_vision(0, 1, dp=2), destination=_language(2, 3, 4, dp=3), counts=(0, 3, 0)
    ),
    "no tokens at all": Case(
        source=_vision(0, 1, dp=2), destination=_language(1, 2, tp=2), counts=(0, 0)
    ),
    "more replicas than samples": Case(
        source=_vision(0, 1, 2, 3, dp=4), destination=_language(3, 4, tp=2), counts=(3, 2)
    ),
    "group of microbatches": Case(
        source=_vision(0, 1, dp=2),
        destination=_language(1, 2, 3, 4, tp=2, dp=2),
        counts=(1, 4, 0, 3, 2, 2),
        num_microbatches=3,
    ),
    "context-parallel destination": Case(
        source=_vision(0, 1, dp=2),
        destination=_language(1, 2, 3, 4, tp=2, cp=2),
        counts=(4, 3),
    ),
    "context-parallel destination on a tensor-parallel source": Case(
        source=_vision(0, 1, 2, 3, tp=2, dp=2),
        destination=_language(0, 1, 2, 3, cp=2, dp=2),
        counts=(4, 3, 2, 6),
        num_microbatches=2,
    ),
    "context-parallel destination with parts of sequences": Case(
        source=_vision(0, 1, dp=2),
        destination=_language(1, 2, 3, 4, tp=2, cp=2),
        counts=(6, 3),
        sharding=SequenceSharding(sequence_length=8, cp=2),
    ),
    "context- and sequence-parallel destination": Case(
        source=_vision(0, 1, 2, tp=3),
        destination=_language(1, 2, 3, 4, tp=2, cp=2),
        counts=(7, 2),
        sharding=SequenceSharding(sequence_length=8, cp=2, tp=2),
    ),
    "sequence-parallel replicas": Case(
        source=_vision(0, 1, 2, 3, tp=2, dp=2),
        destination=_language(0, 1, 2, 3, tp=2, dp=2),
        counts=(4, 0, 5, 1),
        sharding=SequenceSharding(sequence_length=6, tp=2),
        num_microbatches=2,
    ),
    "pipelines on both sides": Case(
        source=_vision(0, 1, 2, 3, tp=2, pp=2),
        destination=_language(1, 4, 0, 3, tp=2, pp=2),
        counts=(3, 4),
        num_microbatches=2,
    ),
}


@pytest.fixture(scope="module")
def outcomes():
    return run_ranks(_run_cases, 5)


@pytest.mark.parametrize("name", CASES)
def test_exchange_gives_every_rank_the_rows_that_it_keeps(outcomes, name):
    case = CASES[name]
    outputs, _ = _unsharded(case)

    for microbatch in range(case.num_microbatches):
        first = case.first_row(microbatch)
        for rank, rows in case.owners(microbatch)[1].rows.items():
            received = outcomes[rank][name]["received"][microbatch]
            expected = outputs[[first + row for row in rows.numbers()]]
            torch.testing.assert_close(received, expected)


@pytest.mark.parametrize("name", CASES)
def test_exchange_gives_every_replica_of_the_source_the_unsharded_gradient(outcomes, name):
    case = CASES[name]
    _, gradients = _unsharded(case)

    for rank, rows in _group_rows(case).items():
        gradient = outcomes[rank][name]["input_gradient"]
        torch.testing.assert_close(gradient, gradients[rows.start : rows.stop])


@pytest.mark.parametrize("name", CASES)
def test_exchange_brings_a_rank_no_more_bytes_than_it_lacks(outcomes, name):
    case = CASES[name]

    for rank in range(5):
        lacking, padding = 0, 0
        for microbatch in range(case.num_microbatches):
            source, destination = (owner.rows for owner in case.owners(microbatch))
            held = set(source.get(rank, Rows()).numbers())
            lacking += sum(row not in held for row in destination.get(rank, Rows()).numbers())
            # The all-gather needs equal shares: less than a row for each replica is padding.
            padding += case.destination.tensor_model_parallel_size - 1
        received = total_received_bytes(outcomes[rank][name]["forward"])
        assert lacking * ROW_BYTES <= received <= (lacking + padding) * ROW_BYTES


@pytest.mark.parametrize("name", CASES)
def test_exchange_issues_an_order_that_cannot_hang(outcomes, name):
    for direction in ("forward", "backward"):
        replay({rank: outcome[name][direction] for rank, outcome in enumerate(outcomes)})


def test_exchange_issues_one_batch_for_a_microbatch_and_none_without_rows(outcomes):
    def num_batches(rank, name):
        entries = outcomes[rank][name]["forward"]
        return sum(isinstance(entry, Issue) and entry.operation == P2P for entry in entries)

    assert num_batches(0, "context-parallel destination") == 1
    assert num_batches(1, "context-parallel destination") == 1
    assert num_batches(0, "no tokens at all") == 0
    assert num_batches(0, "equal ranks, equal layouts") == 0
    assert num_batches(4, "equal ranks, equal layouts") == 0


def test_exchange_over_gloo_carries_host_memory_and_delivers_on_its_device():
    # A tensor on "meta" has no memory: gloo could not have received into it.
    assert run_ranks(_receive_on_meta, 2) == [("cpu", 0), ("meta", 4)]


def _receive_on_meta(rank: int) -> tuple[str, int]:
    case = CASES["one to one"]
    exchange = Exchange(
        group=GroupFactory(rank).group((0, 1), scope="boundary"),
        gather_group=None,
        hidden_size=HIDDEN,
        dtype=torch.float32,
        device=CPU if rank == 0 else torch.device("meta"),
    )
    rows = exchange.post(route(*case.owners(0)), _inputs(case) if rank == 0 else None).wait()
    return str(rows.device), rows.shape[0]


def _unsharded(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, weight = _inputs(case), _weight()
    inputs.requires_grad_()
    outputs = inputs @ weight
    _loss(outputs, _scales(case)).backward()
    assert inputs.grad is not None
    return outputs.detach(), inputs.grad


def _inputs(case: Case) -> torch.Tensor:
    return torch.randn(sum(case.counts), HIDDEN, generator=torch.Generator().manual_seed(1))


def _weight() -> torch.Tensor:
    return torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(2))


def _scales(case: Case) -> torch.Tensor:
    return torch.arange(1.0, sum(case.counts) + 1)  # tells the rows apart


def _loss(rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (rows.square().sum(dim=1) * scales).sum()


def _group_rows(case: Case) -> dict[int, Interval]:
    """Rows of the whole group that each rank of the source's last stage computes."""
    source = case.source
    samples = encoder_samples(len(case.counts), data_parallel_size=source.data_parallel_size)
    last_stage = source.pipeline_model_parallel_size - 1
    return {
        rank: Interval(sum(case.counts[:start]), sum(case.counts[:stop]))
        for rank in source.stage_ranks(last_stage)
        for start, stop in [samples[source.coordinates(rank).dp]]
    }


def _run_cases(rank: int) -> dict[str, dict]:
    everyone = tuple(range(5))
    members = {"forward": everyone, "gradient": everyone}
    for case in CASES.values():
        for placement in (case.source, case.destination):
            for ranks in placement.groups("tp"):
                members.setdefault(f"{placement.name}.tp{sorted(ranks)}", tuple(sorted(ranks)))
    factory = GroupFactory(rank)
    groups = {name: factory.group(ranks, scope=name) for name, ranks in members.items()}
    return {name: _run_case(case, rank, groups) for name, case in CASES.items()}


def _run_case(case: Case, rank: int, groups: dict[str, dist.ProcessGroup]) -> dict:
    owners = [case.owners(microbatch) for microbatch in range(case.num_microbatches)]
    rows = _group_rows(case).get(rank)
    inputs = None if rows is None else _inputs(case)[rows.start : rows.stop].requires_grad_()
    outputs = None if inputs is None else inputs @ _weight()
    with record() as forward:
        parts = _split(outputs, [source.rows.get(rank) for source, _ in owners])
        received = _exchange(groups, "forward", case.destination, rank, owners, parts)
    leaves = [tensor.detach().requires_grad_() for tensor in received]
    for microbatch, leaf in enumerate(leaves):
        _backward(case, microbatch, rank, leaf)
    with record() as backward:
        gradients = _exchange(
            groups, "gradient", case.source, rank, owners, [leaf.grad for leaf in leaves]
        )
    if outputs is not None:
        outputs.backward(torch.cat(gradients))
    return {
        "received": received,
        "input_gradient": None if inputs is None else inputs.grad,
        "forward": forward,
        "backward": backward,
    }


def _split(outputs: torch.Tensor | None, rows: Sequence[Rows | None]) -> list[torch.Tensor | None]:
    if outputs is None:
        return [None for _ in rows]
    return list(outputs.split([each.size for each in rows if each is not None]))


def _exchange(
    groups: dict[str, dist.ProcessGroup],
    direction: str,
    receiver: ModulePlacement,
    rank: int,
    owners: Sequence[tuple[Ownership, Ownership]],
    parts: Sequence[torch.Tensor | None],
) -> list[torch.Tensor]:
    """Posts all microbatches before it waits for the first."""
    gather_group = None
    for ranks in receiver.groups("tp"):
        if rank in ranks:
            gather_group = groups[f"{receiver.name}.tp{sorted(ranks)}"]
    exchange = Exchange(
        group=groups[direction],
        gather_group=gather_group,
        hidden_size=HIDDEN,
        dtype=torch.float32,
        device=CPU,
    )
    plan = {"forward": route, "gradient": gradient_route}[direction]
    routes: list[Route] = [plan(*pair) for pair in owners]
    pendings = [
        exchange.post(planned, part if rank in planned.held else None)
        for planned, part in zip(routes, parts, strict=True)
    ]
    received = [pending.wait() for pending in pendings]
    for pending in pendings:
        pending.finish()
    return received


def _backward(case: Case, microbatch: int, rank: int, leaf: torch.Tensor) -> None:
    """Gradient of the loss of this rank's rows.

    Where context-parallel ranks keep the same rows each has the gradient of a part of them.
    """
    destination = case.destination
    if rank not in destination.stage_ranks(0):
        return
    rows = list(case.owners(microbatch)[1].rows[rank].numbers())
    scales = _scales(case)[[case.first_row(microbatch) + row for row in rows]]
    if case.sharding is None:
        cp = destination.coordinates(rank).cp
        scales *= torch.arange(len(rows)) % destination.context_parallel_size == cp
    _loss(leaf, scales).backward()
