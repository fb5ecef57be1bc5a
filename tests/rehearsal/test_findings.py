import numpy as np

from megatron_mosaic.comm.replay import Issue, Wait
from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.rehearsal.expected import expected_groups, expected_walk
from megatron_mosaic.rehearsal.findings import MOST_LINES, Finding, ended_findings, findings_of
from megatron_mosaic.rehearsal.job import Runs
from megatron_mosaic.rehearsal.record import Record, Walked
from megatron_mosaic.rehearsal.shards import Shard

PLAN = Plan.loads(
    """
format: 1
world_size: 2
global_batch_size: 2
micro_batch_size: 1
modules:
  language: {ranks: 0-1, pipeline_model_parallel_size: 2, layers_per_stage: [1, 2]}
schedule: {kind: 1f1b}
""",
    where="plan",
)


def test_expected_groups_are_lines_of_the_rank_grid():
    # Fastest first tp, cp, dp, pp: 4 5 | 6 7 are the replicas of stage 0, 0 1 | 2 3 of stage 1.
    placement = ModulePlacement(
        name="language",
        ranks=(4, 5, 6, 7, 0, 1, 2, 3),
        tensor_model_parallel_size=2,
        data_parallel_size=2,
        pipeline_model_parallel_size=2,
        expert_model_parallel_size=2,
        expert_tensor_parallel_size=1,
        sequence_parallel=True,
    )

    assert expected_groups(placement, 7) == {
        "tp": (6, 7),
        "cp": (7,),
        "dp": (5, 7),
        "pp": (7, 3),
        "expt_tp": (7,),
        "ep": (6, 7),
        "expt_dp": (5, 7),
    }


def _record(rank: int, **changes) -> Record:
    """What a rank records of two steps of nothing but its first weight."""
    layers = {0: (0,), 1: (1, 2)}[rank]
    shard = Shard(dim=-1, stride=1, tp=0, summed=False, values=np.ones(3, np.float32))
    weights = {f"language_model.decoder.layers.{layer}.weight": shard for layer in layers}
    walks = [
        Walked(
            False, list(expected_walk(PLAN, rank, forward_only=False, is_first=True, is_last=last))
        )
        for last in (False, True)
    ]
    issue = Issue(0, "world", (0, 1), "all_reduce", 1, 4)
    record = Record(
        losses=[{"lm loss": [1.0]}] * 2,
        evaluations=[{"lm loss": [1.0]}],
        gradients=[weights] * 2,
        weights=[weights] * 3,
        walked=walks,
        groups={"language": expected_groups(PLAN.language, rank)},
        communication=[issue, Wait(0)],
    )
    for name, value in changes.items():
        setattr(record, name, value)
    return record


def _failed(changes_of_rank_1=None, resumed=None) -> dict[str, tuple[str, ...]]:
    records = [_record(0), _record(1, **(changes_of_rank_1 or {}))]
    runs = []
    for record in records:
        again = Record(losses=record.losses[1:], weights=record.weights[1:])
        runs.append(Runs(record, again, 0.0))
    if resumed is not None:
        runs[1] = runs[1]._replace(resumed=resumed)
    whole = _record(0)
    both = {**records[0].weights[0], **_record(1).weights[0]}
    whole.gradients, whole.weights = [both] * 2, [both] * 3
    return {each.subject: each.lines for each in findings_of(PLAN, runs, whole) if each.lines}


def test_records_as_the_plan_says_have_no_findings():
    assert _failed() == {}


def test_group_in_another_order_is_found():
    groups = {"language": {"pp": (1, 0)}}

    assert _failed({"groups": groups}) == {
        "groups": ("rank 1: pp group of language=[1, 0] must be [0, 1]",)
    }


def test_layers_on_another_stage_are_found():
    weights = {
        name.replace("layers.1", "layers.0"): shard for name, shard in _record(1).weights[0].items()
    }
    lines = _failed({"weights": [weights] * 3})["layers"]

    assert lines == ("rank 1: layers of language=[0, 2] must be [1, 2]",)


def test_step_that_a_rank_left_out_is_found():
    walked = _record(1).walked
    left_out = [Walked(False, walked[0].steps[1:]), walked[1]]
    (line,) = _failed({"walked": left_out})["schedule"]

    assert line.startswith("rank 1: step 0 of walk 0=")


def test_operation_that_the_other_rank_lacks_is_found():
    lines = _failed({"communication": []})["order of communication"]

    assert lines[0] == "ranks would hang:"


def test_weights_that_were_loaded_otherwise_are_found():
    record = _record(1)
    weights = [
        {name: shard._replace(values=shard.values + 1e-7) for name, shard in each.items()}
        for each in record.weights[1:]
    ]
    lines = _failed(resumed=Record(losses=record.losses[1:], weights=weights))["checkpoint"]

    # One unit in the last place of fp32 at 1 is 1.2e-7.
    assert len(lines) == 2
    assert lines[0].startswith("rank 1: weights loaded=['language_model.decoder.layers.1.weight'")


def test_what_ranks_said_is_found_where_they_did_not_end():
    text = "rank 1 of 2 raised SystemExit:\n...\nerror: plan: it must work; do\nKeyError: 'x'\n"
    groups, ended = ended_findings(PLAN, text, [{}, {}])

    assert groups.passed
    assert ended.lines == ("rank 1 of 2 raised SystemExit:", "plan: it must work; do", "'x'")


def test_finding_shows_its_first_lines():
    finding = Finding(subject="groups", lines=tuple(map(str, range(MOST_LINES + 3))))

    assert finding.shown()[-1] == "and 3 more"
    assert len(finding.shown()) == MOST_LINES + 1
