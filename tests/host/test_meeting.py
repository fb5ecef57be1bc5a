"""Which plan file the ranks of a run take."""

import pytest

from megatron_mosaic import run
from megatron_mosaic.errors import PlanError
from megatron_mosaic.host.meeting import plan_path


def test_plan_is_the_one_for_the_number_of_ranks(tmp_path):
    (tmp_path / "plan-48.yaml").touch()

    path = plan_path(str(tmp_path / "plan-{world_size}.yaml"), world_size=48)

    assert path == tmp_path / "plan-48.yaml"


def test_missing_plan_for_the_number_of_ranks_is_named_with_what_makes_it(tmp_path):
    with pytest.raises(
        PlanError,
        match=r"plan-6.yaml: file must be there for a run of 6 ranks; make it with megatron-mosaic "
        r"plan --from PLAN --gpus 6 -o .*plan-6.yaml$",
    ):
        plan_path(str(tmp_path / "plan-{world_size}.yaml"), world_size=6)


def test_plan_of_another_name_is_taken_as_it_is():
    # Whether it can be read is another's question.
    assert str(plan_path("plan.yaml", world_size=6)) == "plan.yaml"


def test_start_by_hand_has_no_number_of_ranks_to_put(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    script = tmp_path / "script.py"
    script.touch()

    assert run.main([str(script), "--mosaic-plan", "plan-{world_size}.yaml"]) == 2

    assert capsys.readouterr().err == (
        "error: run: --mosaic-plan=plan-{world_size}.yaml must name one file when no launcher says "
        "how many ranks there are; write their number, or start it with torchrun\n"
    )
