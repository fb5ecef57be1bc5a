"""What all formats have in common, and the command that writes them."""

import pytest

from megatron_mosaic.cli import main
from megatron_mosaic.errors import PlanError
from megatron_mosaic.planner.emit.formats import FORMATS
from tests.planner.emitted import DISJOINT, HOMOGENEOUS, emitted, interleaved


@pytest.mark.parametrize(
    ("form", "field"), [("mimo", "    sequence_parallel: true\n"), ("bridge", "")]
)
def test_forms_without_virtual_stages_refuse_them(form, field):
    # 12 microbatches of 2 samples on 2 replicas fill a pipeline of 3 ranks.
    source = interleaved(DISJOINT, field).replace("batch_size: 64", "batch_size: 48")

    with pytest.raises(PlanError, match="virtual_pipeline_model_parallel_size=2 must be 1"):
        emitted(form, source)


@pytest.mark.parametrize(
    ("form", "source", "kind"),
    [
        ("megatron", HOMOGENEOUS, "bubble_fill"),
        ("mimo", DISJOINT, "bubble_fill"),
        ("megatron", HOMOGENEOUS, "concurrent"),
    ],
)
def test_other_programs_fill_no_bubbles_and_run_one_module_at_a_time(form, source, kind):
    source = source.replace("{kind: colocated, encoder_group: 1}", f"{{kind: {kind}}}")

    with pytest.raises(PlanError, match=f"kind={kind} must be colocated"):
        emitted(form, source.replace("{kind: 1f1b}", f"{{kind: {kind}}}"))


@pytest.mark.parametrize("form", ["megatron", "mimo", "bridge"])
@pytest.mark.parametrize(
    ("module", "key", "refusal"),
    [
        ("language:", "attention: {mask: causal}", "attention=causal must be absent"),
        ("vision:", "items: balanced", "items=balanced must be in_order"),
    ],
)
def test_other_programs_know_no_masks_and_no_balance(form, module, key, refusal):
    source = HOMOGENEOUS.replace(module, f"{module}\n    {key}")

    with pytest.raises(PlanError, match=rf"^plan\.yaml: modules\.{module} {refusal}.*; use --form"):
        emitted(form, source)


def test_refusal_names_the_formats_that_can():
    with pytest.raises(
        PlanError,
        match=r"^plan\.yaml: modules\.language: ranks=4-15 must be all ranks .* for --format "
        r"megatron; use --format bridge or torchrun or slurm$",
    ):
        emitted("megatron", DISJOINT)


def test_refusal_of_all_formats_names_the_nodes():
    with pytest.raises(PlanError, match=r"gpus_per_node=7.*; give --gpus-per-node a divisor of 8 "):
        emitted(
            "slurm", HOMOGENEOUS.replace("encoder_group: 1", "encoder_group: 2"), gpus_per_node=7
        )


@pytest.mark.parametrize("form", FORMATS)
def test_args_command_prints_every_format(form, tmp_path, capsys):
    path = tmp_path / "plan.yaml"
    path.write_text(HOMOGENEOUS)

    status = main(["args", str(path), "--format", form])

    captured = capsys.readouterr()
    if form in ("mimo", "bridge"):
        assert status == 2
        assert len(captured.err.splitlines()) == 1
        assert captured.err.startswith(f"error: {path}: modules.vision: ranks=0-3 must be 8-11")
    else:
        assert status == 0
        assert captured.out.count("\n") > 3


def test_args_command_refuses_nodes_without_gpus(capsys):
    status = main(["args", "plan.yaml", "--format", "slurm", "--gpus-per-node", "0"])

    assert status == 2
    assert "--gpus-per-node=0 must be >= 1" in capsys.readouterr().err
