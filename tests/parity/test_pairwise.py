"""Any two choices of a layout work together: see ``pairwise.py`` for the choices."""

import pytest

from megatron_mosaic.comm.replay import replay
from tests.parity.pairwise import covering_cases, uncovered_pairs
from tests.parity.training import compared, trained


def test_every_legal_pair_of_choices_is_in_some_plan():
    cases = covering_cases()

    assert uncovered_pairs(cases) == set()
    assert uncovered_pairs(cases[1:]) != set()


@pytest.mark.parametrize("case", covering_cases(), ids=lambda case: case.name)
def test_plan_trains_like_one_process(case, tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text(f"# options: {' '.join(case.options())}\n{case.plan()}")

    records = trained(plan, "sgd")

    result = compared(records, plan, "sgd")
    assert not result.failures, "\n".join(result.failures[:20])
    replay({rank: record.communication for rank, record in enumerate(records)})
