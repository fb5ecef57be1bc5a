import pytest

from megatron_mosaic.cli import main

PLAN = """
format: 1
world_size: 2
global_batch_size: 4
micro_batch_size: 1
modules:
  vision: {ranks: 0-1, data_parallel_size: 2}
  language: {ranks: 0-1, pipeline_model_parallel_size: 2}
edges: [[vision, language]]
schedule: {kind: bubble_fill}
"""


def _rehearse(tmp_path, text, *options):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    return main(["rehearse", str(path), *options])


def test_rehearse_says_what_it_proved_and_what_not(tmp_path, capsys):
    assert _rehearse(tmp_path, PLAN) == 0

    said = capsys.readouterr().out
    assert "rehearses 2 ranks, 4 microbatches a step, schedule bubble_fill" in said
    for proven in ("groups", "schedule", "order of communication", "parity", "checkpoint"):
        assert f"proven  {proven}" in said
    assert "not proven: kernels of GPUs, NCCL" in said
    assert "runs as planned: 2 ranks" in said


def test_rehearse_finds_what_only_a_launch_finds(tmp_path, capsys):
    # Which models may have context parallelism, a plan alone does not know.
    sound = "  sound: {ranks: 0-1, data_parallel_size: 2}\n"
    plan = PLAN.replace("  language:", f"{sound}  language:").replace(
        "pipeline_model_parallel_size", "context_parallel_size"
    )
    plan = plan.replace("[[vision, language]]", "[[vision, language], [sound, language]]")

    assert _rehearse(tmp_path, plan) == 1

    said = capsys.readouterr().out
    assert "modules.language: context_parallel_size=2 must be 1" in said
    assert "does not run as planned" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ranks", "1"), "world_size=2 must fold to <= 1 ranks"),
        (("--ranks", "0"), "--ranks=0 must be > 0"),
        (("--time-limit", "-1"), "--time-limit=-1.0 must be > 0"),
    ],
)
def test_rehearse_refuses_what_it_cannot_do(tmp_path, capsys, options, message):
    assert _rehearse(tmp_path, PLAN, *options) == 2

    assert message in capsys.readouterr().err
