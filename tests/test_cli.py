import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mosaic.cli import main

ROOT = Path(__file__).parents[1]
BROKEN_PLANS = sorted((Path(__file__).parent / "broken_plans").glob("*.yaml"))

GOOD_PLAN = """\
format: 1
world_size: 10
global_batch_size: 64
micro_batch_size: 2
modules:
  vision: {ranks: [0, 2-6], data_parallel_size: 6, trainable: [projector]}
  language:
    ranks: 0-7
    tensor_model_parallel_size: 2
    pipeline_model_parallel_size: 2
    data_parallel_size: 2
edges: [[vision, language]]
schedule: {kind: colocated, encoder_group: 4}
"""

PIPELINE_PLAN = """\
format: 1
world_size: 4
global_batch_size: 4
micro_batch_size: 1
modules:
  vision: {ranks: 0, trainable: []}
  language: {ranks: 1-2, pipeline_model_parallel_size: 2}
edges: [[vision, language]]
schedule: {kind: 1f1b}
"""


@pytest.fixture
def good_plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("plan.yaml")
    path.write_text(GOOD_PLAN)
    return str(path)


def run_process(*arguments):
    command = [sys.executable, "-m", "megatron_mosaic.cli", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )


def test_broken_plans_are_more_than_thirty():
    assert len(BROKEN_PLANS) >= 30


@pytest.mark.parametrize("path", BROKEN_PLANS, ids=lambda path: path.stem)
def test_check_explains_broken_plan_in_one_line(path, capsys):
    expected, *more = (
        line.split(": ", maxsplit=1)[1]
        for line in path.read_text().splitlines()
        if line.startswith(("# expect: ", "# draws: "))
    )

    status = main(["check", str(path)])

    captured = capsys.readouterr()
    message, *drawn = captured.err.splitlines()
    assert status == 2
    assert captured.out == ""
    assert message.startswith(f"error: {path}: ")
    assert re.search(expected, message)
    assert re.search(r" must .*; \S", message), "names no remedy"
    # An order that cannot run has its rows below the line; no other fault has.
    assert drawn[-1:] == more


def test_check_prints_the_layout(good_plan, capsys):
    status = main(["check", good_plan, "--world-size", "10"])

    # 64 / (2 * 2) = 16 microbatches; 4 of them are 16 samples, over 6 encoder replicas 2 or 3.
    summary, table = capsys.readouterr().out.split("\n\n")
    assert status == 0
    assert summary.splitlines()[:3] == [
        "64 samples per step: 16 microbatches of 4 samples",
        "schedule colocated on 10 ranks",
        "idle ranks 8-9",
    ]
    assert [line.split() for line in table.splitlines()] == [
        ["module", "ranks", "tp", "cp", "dp", "pp", "microbatches/task", "samples/task"],
        ["language", "0-7", "2", "1", "2", "2", "1", "2"],
        ["vision", "[0,", "2-6]", "1", "1", "6", "1", "4", "2-3"],
    ]


def test_check_prints_the_grid_of_experts(tmp_path, capsys):
    path = tmp_path / "plan.yaml"
    sizes = "    data_parallel_size: 2\n"
    path.write_text(GOOD_PLAN.replace(sizes, f"{sizes}    expert_model_parallel_size: 2\n"))

    main(["check", str(path)])

    table = capsys.readouterr().out.split("\n\n")[1]
    assert [line.split()[-9:] for line in table.splitlines()] == [
        ["tp", "cp", "dp", "pp", "etp", "ep", "edp", "microbatches/task", "samples/task"],
        # A stage has 2 * 2 ranks: experts are split over pairs, in two parts, without replicas.
        ["2", "1", "2", "2", "2", "2", "1", "1", "2"],
        ["1", "1", "6", "1", "1", "1", "6", "4", "2-3"],
    ]


def test_check_prints_the_mask_and_what_is_balanced(tmp_path, capsys):
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "format: 1\nworld_size: 2\nglobal_batch_size: 2\nmicro_batch_size: 1\n"
        "modules:\n  vision: {ranks: 0-1, data_parallel_size: 2, items: balanced}\n"
        "  language: {ranks: 0-1, context_parallel_size: 2, attention: {mask: prefix_lm}}\n"
        "edges: [[vision, language]]\nschedule: {kind: colocated}\n"
    )

    assert main(["check", str(plan)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "attention under the mask prefix_lm, tokens balanced over 2 ranks, keys auto" in lines
    assert "items of vision go to replicas by cost" in lines


def test_check_refuses_another_number_of_launched_ranks(good_plan, capsys):
    status = main(["check", good_plan, "--world-size", "8"])

    assert status == 2
    assert capsys.readouterr().err == (
        "error: plan.yaml: world_size=10 must equal the 8 launched ranks; "
        "launch 10 ranks or plan for 8\n"
    )


def test_check_reports_missing_file(capsys):
    status = main(["check", "no.yaml"])

    assert status == 2
    assert capsys.readouterr().err == (
        "error: no.yaml: file must be readable text (No such file or directory); "
        "give the path of a plan file\n"
    )


def test_check_reports_directory(tmp_path, capsys):
    status = main(["check", str(tmp_path)])

    assert status == 2
    assert "file must be readable text (Is a directory)" in capsys.readouterr().err


def test_check_reports_binary_file(tmp_path, capsys):
    path = tmp_path / "plan.yaml"
    path.write_bytes(b"\xff\xfe\x00")

    status = main(["check", str(path)])

    assert status == 2
    assert "file must be readable text (not UTF-8 text)" in capsys.readouterr().err


def test_check_reports_control_characters_in_one_line(tmp_path, capsys):
    path = tmp_path / "plan.yaml"
    path.write_text("format: 1\nworld_size: \x07\n")

    status = main(["check", str(path)])

    error = capsys.readouterr().err
    assert status == 2
    assert len(error.splitlines()) == 1
    assert re.search(r"text must be YAML \(.*special characters", error)


def test_show_reports_broken_plan_in_one_line(capsys):
    status = main(["show", "no.yaml"])

    assert status == 2
    assert capsys.readouterr().err.startswith("error: no.yaml: file must be readable text")


def test_show_draws_the_schedule_of_every_rank(tmp_path, capsys):
    path = tmp_path / "plan.yaml"
    path.write_text(PIPELINE_PLAN)

    status = main(["show", str(path)])

    # Rank 3 hosts nothing; the encoder is frozen and has no backward.
    assert status == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "rank 0  vision.0    vF0 vF1 vF2 vF3",
        "rank 1  language.0  F0 F1 B0 F2 B1 F3 B2 B3",
        "rank 2  language.1  F0 B0 F1 B1 F2 B2 F3 B3",
        "rank 3  idle",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: command"),
        (["cheque"], "invalid choice: 'cheque'"),
        (["check"], "the following arguments are required: plan"),
        (["check", "plan.yaml", "--world-size", "many"], "invalid int value: 'many'"),
    ],
)
def test_cli_reports_wrong_command_line_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)

    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert error.startswith("error: ")
    assert message in error
    assert re.search(r"; run 'megatron-mosaic.* --help'", error)


def test_cli_process_succeeds_on_good_plan(good_plan):
    process = run_process("check", Path(good_plan).resolve())

    assert (process.returncode, process.stderr) == (0, "")
    assert "language" in process.stdout


def test_cli_process_fails_in_one_line_on_broken_plan():
    process = run_process("check", BROKEN_PLANS[0])

    assert process.returncode == 2
    assert process.stdout == ""
    assert re.fullmatch(r"error: .*; .*\n", process.stderr)


def test_cli_process_whose_reader_has_gone_says_nothing(good_plan):
    command = f"{sys.executable} -m megatron_mosaic.cli check {Path(good_plan).resolve()} | true"

    process = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )

    assert (process.returncode, process.stderr) == (0, "")
