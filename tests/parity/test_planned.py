"""Plans of the planner train as they are, for the model that the parity script builds."""

from pathlib import Path

import pytest

from megatron_mosaic.cli import main
from megatron_mosaic.comm.replay import replay
from megatron_mosaic.layout.plan import Plan
from tests.parity.training import compared, trained

MODEL = Path(__file__).parent / "planned" / "model.yaml"


@pytest.mark.parametrize(
    "pins",
    [
        ["placement=disjoint", "language.pipeline_model_parallel_size=2"],
        ["placement=colocated", "language.tensor_model_parallel_size=2"],
        ["placement=partial overlap"],
        ["placement=homogeneous", "language.pipeline_model_parallel_size=2"],
        ["placement=colocated", "schedule.kind=concurrent", "vision.share.sms=32"],
    ],
    ids=["disjoint", "colocated", "partial overlap", "homogeneous", "at the same time"],
)
def test_plan_trains_like_one_process(pins, tmp_path):
    path = tmp_path / "plan.yaml"
    pinned = [f"--set={pin}" for pin in ["micro_batch_size=2", *pins]]
    asked = [str(MODEL), "h100", "--gpus=4", "--global-batch-size=16", *pinned]
    assert main(["plan", *asked, "-o", str(path)]) == 0
    assert Plan.load(path).predicted["placement"] == pins[0].partition("=")[2]

    records = trained(path, "sgd")

    result = compared(records, path, "sgd")
    assert not result.failures, "\n".join(result.failures[:20])
    replay({rank: record.communication for rank, record in enumerate(records)})
