import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.layout.rows import Interval
from tests.host.hosted import hosted_modules
from tests.ranks import run_ranks

PLAN = """
format: 1
world_size: 3
global_batch_size: 8
micro_batch_size: 2
modules:
  vision: {ranks: 0-2, data_parallel_size: 3}
  language: {ranks: 1-2, data_parallel_size: 2}
edges: [[vision, language]]
schedule: {kind: colocated}
"""


class _Samples(torch.utils.data.Dataset):
    """Every sample has one image; remembers which were read."""

    def __init__(self, length=20, broken=None, offset=0):
        self.read = []
        self._length = length
        self._broken = broken
        self._offset = offset

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        if index == self._broken:
            raise OSError("shard\nis torn")
        self.read.append(index)
        return {"tokens": torch.tensor([index + self._offset, -200]), "image": torch.zeros(3, 1, 1)}


class _OneRowPerImage:
    def row_runs(self, batch):
        places = [row.nonzero().flatten().tolist() for row in batch["tokens"] == -200]
        return {"vision": [tuple(Interval(at, at + 1) for at in sample) for sample in places]}

    def document_stops(self, batch):
        return None


def _reader(rank, dataset, *, first_sample=0, positions=False, hands_ahead=False):
    from megatron_mosaic.host.cpu import run_on_cpu

    run_on_cpu()
    from megatron_mosaic.host.data.facts import FactsLayout
    from megatron_mosaic.host.data.reader import StepReader
    from megatron_mosaic.host.data.samples import SampleSource
    from megatron_mosaic.host.data.shares import step_shares
    from megatron_mosaic.host.data.unreadable import Allowance
    from megatron_mosaic.schedule.build import build_schedule

    plan = Plan.loads(PLAN, "plan")
    hosted = hosted_modules(plan, rank)
    shares = step_shares(
        build_schedule(plan), hosted, language=plan.language, samples_per_replica=2
    )
    source = SampleSource(
        dataset,
        shares=shares,
        boundaries=dict.fromkeys(hosted, _OneRowPerImage()),
        first_sample=first_sample,
        num_workers=0,
        allowance=Allowance(0, rank=rank),
    )
    layout = FactsLayout(
        sources=("vision",), item_rows={"vision": 1} if positions else {}, sequence_length=2
    )
    return StepReader(
        source,
        first_sample=first_sample,
        num_samples=shares.num_samples,
        layout=layout,
        group=dist.group.WORLD,
        hands_ahead=hands_ahead,
    )


def _read_two_steps(rank, positions):
    dataset = _Samples()
    steps = list(_reader(rank, dataset, positions=positions))
    tokens = {
        name: [
            sorted(batch["tokens"][:, 0].tolist())
            for step in steps
            for batch in step.batches[name].values()
            if batch is not None
        ]
        for name in steps[0].batches
    }
    return tokens, sorted(dataset.read), [step.rows for step in steps]


@pytest.fixture(scope="module")
def outcomes():
    return run_ranks(_read_two_steps, 3, False)


def test_reader_gives_each_module_its_own_samples(outcomes):
    # Eight samples a step. Vision splits them in three: 0-1, 2-4, 5-7. Language replicas take
    # pairs by turns: 0-1 and 4-5, 2-3 and 6-7.
    assert outcomes[0][0] == {"vision": [[0, 1], [8, 9]]}
    assert outcomes[1][0] == {
        "vision": [[2, 3, 4], [10, 11, 12]],
        "language": [[0, 1], [4, 5], [8, 9], [12, 13]],
    }
    assert outcomes[2][0] == {
        "vision": [[5, 6, 7], [13, 14, 15]],
        "language": [[2, 3], [6, 7], [10, 11], [14, 15]],
    }


def test_reader_reads_nothing_else(outcomes):
    for tokens, read, _ in outcomes:
        wanted = [index for batches in tokens.values() for batch in batches for index in batch]
        assert read == sorted(wanted)


def test_reader_tells_every_rank_the_rows_of_all_samples(outcomes):
    for _, _, rows in outcomes:
        assert rows == [{"vision": (((0, 1),),) * 8}] * 2


def test_reader_tells_every_rank_where_the_rows_belong():
    for _, _, rows in run_ranks(_read_two_steps, 3, True):
        assert rows == [{"vision": (((1, 2),),) * 8}] * 2


def _read_step_by_step(rank):
    from megatron_mosaic.comm.record import record

    dataset = _Samples()
    reader = _reader(rank, dataset)
    with record() as log:
        seen = []
        for _ in reader:
            seen.append(sorted(dataset.read)[-1])
            log.append("tasks")
    return seen, [entry if entry == "tasks" else type(entry).__name__ for entry in log]


def test_next_step_is_read_and_its_exchange_issued_before_the_tasks_of_a_step():
    for _, events in run_ranks(_read_step_by_step, 3):
        # The last exchange says that the data ends.
        assert events == [
            *("Issue", "Wait", "Issue", "tasks"),
            *("Wait", "Issue", "tasks"),
            "Wait",
        ]
    # Samples 8-15 are those of the second step; vision's last third ends with it.
    assert [seen for seen, _ in run_ranks(_read_step_by_step, 3)][2] == [15, 15]


def _first_sample_after(rank):
    reader = _reader(rank, _Samples())
    next(reader)
    resumed = _reader(rank, _Samples(), first_sample=8)
    step = next(resumed)
    return [batch["tokens"][0, 0].item() for batch in step.batches.get("language", {}).values()]


def test_sample_that_was_read_ahead_is_read_again_after_a_resume():
    assert run_ranks(_first_sample_after, 3) == [[], [8, 12], [10, 14]]


def _read_broken(rank, broken, offsets, lengths):
    from megatron_mosaic.errors import HostError, LayoutError

    dataset = _Samples(lengths[rank], broken=broken, offset=offsets[rank])
    steps = []
    try:
        for step in _reader(rank, dataset):
            steps.append(len(step.facts))
    except (HostError, LayoutError) as error:
        return steps, getattr(error, "speaker", None), str(error)
    return steps, None, None


def test_sample_that_one_rank_cannot_read_ends_the_step_before_it_and_stops_all():
    outcomes = run_ranks(_read_broken, 3, 8, (0, 0, 0), (20, 20, 20))

    # Vision reads sample 8 on rank 0, the language model on rank 1; the lower one says it.
    assert [outcome[:2] for outcome in outcomes] == [([8], 0)] * 3
    assert "OSError" in outcomes[0][2]
    assert "OSError 'shard is torn' at " in outcomes[0][2]


def test_ranks_that_read_unlike_texts_stop_together():
    outcomes = run_ranks(_read_broken, 3, None, (0, 1, 0), (20, 20, 20))

    assert outcomes == [outcomes[0]] * 3
    assert "text_checksum" in outcomes[0][2]
    # Rank 1 reads samples 0 and 1 for the language model, rank 0 for vision.
    assert "of sample 0 on one rank must equal" in outcomes[0][2]


def test_data_that_ends_on_one_rank_ends_on_all():
    outcomes = run_ranks(_read_broken, 3, None, (0, 0, 0), (20, 20, 15))

    assert outcomes == [([8], None, None)] * 3


@settings(deadline=None)
@given(
    dp=st.integers(1, 6),
    group=st.integers(1, 4),
    samples_per_replica=st.integers(1, 3),
    language_dp=st.integers(1, 4),
)
def test_encoder_replicas_share_every_sample_of_a_task_once(
    dp, group, samples_per_replica, language_dp
):
    from megatron_mosaic.host.cpu import run_on_cpu

    run_on_cpu()
    from megatron_mosaic.host.data.shares import task_samples

    size = samples_per_replica * language_dp
    placement = ModulePlacement(name="vision", ranks=tuple(range(dp)), data_parallel_size=dp)
    task = tuple(range(group, 2 * group))
    intervals = [
        task_samples(
            placement, task, dp=replica, samples_per_replica=samples_per_replica, size=size
        )
        for replica in range(dp)
    ]

    covered = [sample for start, stop in intervals for sample in range(start, stop)]
    assert covered == list(range(group * size, 2 * group * size))


def _read_with_the_next(rank, broken, lengths):
    from megatron_mosaic.errors import HostError

    reader = _reader(rank, _Samples(lengths[rank], broken=broken), hands_ahead=True)
    steps = []
    try:
        for step in reader:
            ahead = None if step.ahead is None else (step.ahead.first_sample, len(step.ahead.facts))
            steps.append((step.first_sample, ahead))
    except HostError:
        return [*steps, "failed"]
    return steps


@pytest.mark.parametrize(
    ("broken", "lengths", "end"),
    [
        (None, (20, 20, 20), []),
        # Where the data of the third step cannot be had, the second is the last that is whole.
        (None, (24, 24, 20), []),
        (17, (24, 24, 24), ["failed"]),
    ],
    ids=["ends", "ends_on_one_rank", "breaks"],
)
def test_step_is_handed_out_with_the_next_if_every_rank_has_it(broken, lengths, end):
    outcomes = run_ranks(_read_with_the_next, 3, broken, lengths)

    assert outcomes == [[(0, (8, 8)), (8, None), *end]] * 3
