import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.layout.rows import Interval
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

    def __init__(self):
        self.read = []

    def __len__(self):
        return 20

    def __getitem__(self, index):
        self.read.append(index)
        return {"tokens": torch.tensor([index, -200]), "image": torch.zeros(3, 1, 1)}


class _OneRowPerImage:
    def row_runs(self, batch):
        places = [row.nonzero().flatten().tolist() for row in batch["tokens"] == -200]
        return {"vision": [tuple(Interval(at, at + 1) for at in sample) for sample in places]}


def _read_two_steps(rank, positions):
    from megatron_mosaic.host.cpu import run_on_cpu

    run_on_cpu()
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_mosaic.host.data import StepReader
    from megatron_mosaic.host.groups import ModuleGroups
    from megatron_mosaic.schedule.build import build_schedule

    plan = Plan.loads(PLAN, "plan")
    dataset = _Samples()
    hosted = {
        name: ModuleGroups(
            placement=plan.modules[name],
            position=plan.modules[name].coordinates(rank),
            expert_position=plan.modules[name].expert_coordinates(rank),
            collection=ProcessGroupCollection(),
        )
        for name in plan.modules_of(rank)
    }
    reader = StepReader(
        dataset,
        schedule=build_schedule(plan),
        hosted=hosted,
        language=plan.language,
        sources=["vision"],
        boundaries=dict.fromkeys(hosted, _OneRowPerImage()),
        positions=positions,
        samples_per_replica=2,
        first_sample=0,
        num_workers=0,
        host_group=dist.group.WORLD,
    )
    steps = list(reader)
    tokens = {
        name: [
            sorted(batch["tokens"][:, 0].tolist())
            for step in steps
            for batch in step.batches[name].values()
            if batch is not None
        ]
        for name in hosted
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
    from megatron_mosaic.host.data import task_samples

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
