"""A plan made from a former one: for its model, cluster and batch, on the GPUs that are left."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_mosaic.cli import main
from megatron_mosaic.cluster.shipped import cluster_of_size
from megatron_mosaic.errors import PlanError
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.model.shipped import load_model
from megatron_mosaic.planner.planner import cluster_digest, model_digest
from megatron_mosaic.planner.replan import changes, former_cluster, former_model

MODEL = Path(__file__).parent.parent / "parity" / "planned" / "model.yaml"
PLAN = """
format: 1
world_size: 4
global_batch_size: 16
micro_batch_size: 2
modules:
  vision: {ranks: 0-3, data_parallel_size: 4}
  language: {ranks: 0-3, tensor_model_parallel_size: 2, data_parallel_size: 2}
edges: [[vision, language]]
schedule: {kind: colocated}
"""


def _plan(**inputs):
    return replace(Plan.loads(PLAN, "plan"), inputs=inputs or None)


@pytest.fixture
def former(tmp_path, capsys):
    path = tmp_path / "plan.yaml"
    asked = [str(MODEL), "h100", "--gpus=4", "--global-batch-size=16", "--time-limit=1"]
    assert main(["plan", *asked, "--set=micro_batch_size=2", "-o", str(path)]) == 0
    capsys.readouterr()
    return path


def test_plan_from_a_former_one_keeps_its_model_cluster_and_batch(former, tmp_path, capsys):
    path = tmp_path / "left.yaml"

    assert main(["plan", "--from", str(former), "--gpus=3", "-o", str(path)]) == 0

    said, left = capsys.readouterr().out, Plan.load(path)
    assert "the parity script's model on 3 GPUs of h100, 16 samples a step" in said
    assert f"In place of {former}:\n4 GPUs become 3.\nA step has 16 samples as before.\n" in said
    assert "No longer fixed: micro_batch_size=2; --set fixes them again." in said
    assert (left.world_size, left.global_batch_size) == (3, 16)
    assert left.inputs is not None
    assert left.inputs["given"] == {"model": str(MODEL), "cluster": "h100"}


def test_plan_from_a_former_one_takes_what_is_given_again(former, capsys):
    given = ["--gpus=2", "--global-batch-size=8", "--set=micro_batch_size=2", "--json"]

    assert main(["plan", str(MODEL), "--from", str(former), *given]) == 0

    said = yaml.safe_load(capsys.readouterr().out)
    assert said["global_batch_size"] == 8
    assert said["changes"][2].startswith("A step has 8 samples, not 16: the run goes on with")
    assert not any("No longer fixed" in line for line in said["changes"])


def test_plan_from_a_former_one_needs_the_gpus_that_are_left(former, capsys):
    assert main(["plan", "--from", str(former)]) == 2

    expected = f"error: plan: --gpus must be given with --from {former}; add what is left\n"
    assert capsys.readouterr().err == expected


def test_model_file_that_changed_is_not_taken_for_the_former_one(tmp_path):
    file = tmp_path / "model.yaml"
    file.write_text(MODEL.read_text())
    plan = _plan(model=model_digest(load_model(str(file))), given={"model": str(file)})
    assert former_model(plan, where="plan.yaml") == str(file)
    file.write_text(MODEL.read_text().replace("seq_length: 16", "seq_length: 32"))

    with pytest.raises(
        PlanError,
        match=r"^plan.yaml: inputs.model=sha256:\w{12} must be the digest of a shipped model or of "
        r"the file that the plan was made from, and .*model.yaml no longer is; give the model "
        r"again: megatron-mosaic plan MODEL CLUSTER --from plan.yaml$",
    ):
        former_model(plan, where="plan.yaml")


def test_shipped_inputs_are_found_by_digest_alone():
    # As in plans that note no names.
    plan = _plan(
        model=model_digest(load_model("llava-1.5-7b")),
        cluster=cluster_digest(cluster_of_size("h100", num_gpus=4)),
    )

    assert former_model(plan, where="plan") == "llava-1.5-7b"
    assert former_cluster(plan, where="plan") == "h100"


def test_plan_written_by_hand_tells_no_model():
    with pytest.raises(PlanError, match=r"^plan: inputs.model=nothing must be the digest"):
        former_model(_plan(), where="plan")


def test_changes_say_what_befalls_sizes_batch_and_microbatch():
    former = _plan()
    text = PLAN.replace("world_size: 4", "world_size: 3").replace(
        "micro_batch_size: 2", "micro_batch_size: 4"
    )
    text = text.replace("ranks: 0-3, data_parallel_size: 4", "ranks: 0-1, data_parallel_size: 2")
    text = text.replace("ranks: 0-3, tensor_model_parallel_size: 2,", "ranks: 0-1,")

    said = changes(former, Plan.loads(text, "plan"), model=load_model(str(MODEL)))

    assert said == (
        "4 GPUs become 3, of which 2 stay idle.",
        "A step has 16 samples as before.",
        "A microbatch of all replicas has 8 samples, not 4: losses stay the same with "
        "--calculate-per-token-loss; without it, where samples have unlike numbers of tokens, "
        "means are over other microbatches.",
        "language: TP2 DP2 on ranks 0-3 becomes DP2 on ranks 0-1.",
        "vision: DP4 on ranks 0-3 becomes DP2 on ranks 0-1.",
    )
