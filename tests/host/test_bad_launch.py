"""Contradictions that only several processes, or the script, can show."""

import importlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.parity.record import ARGUMENTS, OPTIMIZERS
from tests.ranks import ROOT, run_ranks

PLAN = """format: 1
world_size: 2
global_batch_size: 16
micro_batch_size: 2
modules:
  vision: {{ranks: 0-1, data_parallel_size: 2{vision}}}
  language: {{ranks: 0-1, tensor_model_parallel_size: 2{language}}}
edges: [[vision, language]]
schedule: {{kind: colocated}}
"""
EXPERTS = ", expert_model_parallel_size: 2, expert_tensor_parallel_size: 1, sequence_parallel: true"
ENDS_WITHIN_S = 20


def _stop(
    rank: int, plans: list[str], options: list[str], script: str = "vlm_script"
) -> tuple[int, list[str], float]:
    """Runs the script in this forked rank until it exits."""
    from megatron_mosaic.host.cpu import run_on_cpu

    run_on_cpu()
    from megatron_mosaic.host.arguments import parse_and_validate_args
    from megatron_mosaic.host.training import pretrain

    functions = importlib.import_module(f"tests.parity.{script}")
    lines: list[str] = []

    class Lines:
        def write(self, text: str) -> int:
            lines.extend(line for line in text.splitlines() if line.startswith("error: "))
            return len(text)

        def flush(self) -> None:
            pass

    sys.stderr = Lines()
    sys.argv = ["script", *ARGUMENTS, *OPTIMIZERS["sgd"], *options, "--mosaic-plan", plans[rank]]
    started = time.monotonic()
    try:
        functions.main(parse_and_validate_args, pretrain)
    except SystemExit as stopped:
        return stopped.code, lines, time.monotonic() - started
    return 0, lines, time.monotonic() - started


def _write(folder: Path, name: str, *, vision: str = "", language: str = "", **replace: str) -> str:
    text = PLAN.format(vision=vision, language=language)
    for old, new in replace.items():
        text = text.replace(f"{old}: 2", f"{old}: {new}", 1)
    path = folder / name
    path.write_text(text)
    return str(path)


def _check(outcomes: list[tuple[int, list[str], float]], pattern: str) -> None:
    assert [code for code, _, _ in outcomes] == [2] * len(outcomes)
    lines = [line for _, own, _ in outcomes for line in own]
    assert len(lines) == 1, lines
    assert re.search(pattern, lines[0]), lines[0]
    assert "; " in lines[0]
    assert max(seconds for _, _, seconds in outcomes) < ENDS_WITHIN_S


@pytest.mark.parametrize(
    ("options", "changes", "pattern"),
    [
        ([], {"vision": ", trainable: [projector]"}, r"vision: trainable=\['projector'\] must"),
        (
            ["--freeze-ViT"],
            {},
            r"vision: trainable=everything must agree .* froze 'encoder\.class_token",
        ),
        (["--freeze-LM"], {}, r"language: trainable=everything must agree"),
        ([], {"vision": ", trainable: [tower]"}, r"vision: trainable=\['tower'\] must name parts"),
        (
            ["--train", "*.layers.0.*"],
            {"language": ", trainable: [decoder.*]", "vision": ", trainable: ['*.layers.0.*']"},
            r"language: trainable=\['decoder\.\*'\] must agree .* froze 'decoder\.layers\.1\.",
        ),
        (
            [],
            {"language": ", trainable: ['*', decoder.*.lora_*]"},
            r"language: trainable=.* must select .* \['decoder\.\*\.lora_\*'\] select none",
        ),
        (
            ["--recompute-activations"],
            {"language": ", recompute: full"},
            r"recompute_granularity=selective must equal full, as modules\.language",
        ),
        (
            ["--recompute-granularity", "full", "--recompute-method", "block"],
            {"vision": ", recompute: full"},
            r"recompute_method=block must equal uniform, as modules\.vision",
        ),
        (["--fp16"], {}, r"fp16=True must be False"),
        (["--tensor-model-parallel-size", "4"], {}, r"tensor_model_parallel_size=4 must equal 2"),
        (["--num-attention-heads", "3"], {}, r"parallel_size=2 must divide num_attention_heads=3"),
        (["--dataloader-type", "cyclic"], {}, r"dataloader_type=cyclic must be single or external"),
        (["--log-params-norm"], {}, r"log_params_norm=True must be False"),
        (["--num-experts", "4"], {}, r"sequence_parallel=false must be true with num_experts=4"),
        ([], {"language": EXPERTS}, r"expert_model_parallel_size=2 .* num_experts=None"),
        (["--num-experts", "3"], {"language": EXPERTS}, r"size=2 must divide num_experts=3"),
        (["--expert-model-parallel-size", "2"], {}, r"expert_model_parallel_size=2 must equal 1"),
        (["--moe-use-upcycling"], {}, r"moe_use_upcycling=True must be False"),
        ([], {"world_size": "3"}, r"world_size=3 must equal the 2 launched ranks"),
    ],
)
def test_contradiction_stops_every_rank_with_one_line(tmp_path, options, changes, pattern):
    plan = _write(tmp_path, "plan.yaml", **changes)

    outcomes = run_ranks(_stop, 2, [plan, plan], options, init=False, timeout_s=60)

    _check(outcomes, pattern)


def test_trace_that_a_rank_cannot_write_stops_every_rank_with_one_line(tmp_path):
    plan = _write(tmp_path, "plan.yaml")
    folder = tmp_path / "trace"
    (folder / "rank1.jsonl").mkdir(parents=True)

    options = ["--mosaic-trace", str(folder)]
    outcomes = run_ranks(_stop, 2, [plan, plan], options, init=False, timeout_s=60)

    _check(outcomes, r"mosaic_trace=\S+ must be a folder in which rank 1 can write, not give 'Is a")


@pytest.mark.parametrize(
    ("modules", "options", "pattern"),
    [
        (["vision", "audio"], ["vision"], r"names=\['audio', .* must be \['language', 'vision'\]"),
        (["vision"], ["vision", "audio"], r"names=.* must be \['audio', 'language', 'vision'\]"),
        (["vision"], ["generator"], r"names=.* must be \['generator', 'language'\]"),
        (["generator"], ["generator"], r"edges: edges=.* must be \[\['language', 'generator'\]\]"),
        (["paired_clip"], ["paired"], r"must be \['language', 'paired_clip', 'paired_dino'\]"),
        (
            ["unknown_clip", "unknown_dino"],
            ["unknown"],
            r"must be one module unknown, for VisionModalitySubmodules does not say how many rows",
        ),
        (["wrong_clip", "wrong_dino"], ["wrong"], r"model: rows=\(\d+, \d+\) that wrong_\w+ made"),
    ],
)
def test_plan_for_another_model_stops_every_rank(tmp_path, modules, options, pattern):
    plan = tmp_path / "plan.yaml"
    text = PLAN.format(vision="", language="").replace("[[vision, language]]", "EDGES")
    own = "\n".join(f"  {name}: {{ranks: 0-1, data_parallel_size: 2}}" for name in modules)
    text = re.sub(r"  vision: .*", own, text)
    plan.write_text(text.replace("EDGES", str([[name, "language"] for name in modules])))
    plans = [str(plan)] * 2

    outcomes = run_ranks(
        _stop, 2, plans, ["--modalities", *options], "mimo_script", init=False, timeout_s=60
    )

    if options == ["wrong"]:
        # Each rank that runs the encoder finds it by itself.
        lines = [line for _, own, _ in outcomes for line in own]
        assert lines
        assert all(re.search(pattern, line) for line in lines), lines
    else:
        _check(outcomes, pattern)


def test_plan_of_another_model_stops_every_rank(tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN.format(vision="", language="").replace("vision", "audio"))

    outcomes = run_ranks(_stop, 2, [str(plan)] * 2, [], init=False, timeout_s=60)

    _check(outcomes, r"names=\['audio', 'language'\] must be \['language', 'vision'\] for LLaVA")


def test_damaged_sample_stops_every_rank(tmp_path):
    plan = _write(tmp_path, "plan.yaml")

    # Sample 13 is among the second half of the step, which the encoder reads on rank 1.
    outcomes = run_ranks(
        _stop, 2, [plan, plan], ["--damaged-sample", "13"], init=False, timeout_s=60
    )

    _check(outcomes, r"data: images=\d+ must equal the image tokens=\d+ of the batch")


def test_unequal_sequences_that_would_hang_experts_stop_every_rank(tmp_path):
    plan = _write(
        tmp_path,
        "plan.yaml",
        language=", expert_model_parallel_size: 2",
        tensor_model_parallel_size="1, data_parallel_size: 2",
    )

    # allgather is Megatron's default. In the first microbatch one replica has at most one image in
    # a sample, the other two.
    outcomes = run_ranks(_stop, 2, [plan, plan], ["--num-experts", "4"], init=False, timeout_s=60)

    _check(outcomes, r"data: rows=\[4, 8\] in the longest sample of 2 replicas must be equal")


def test_loss_that_changes_its_report_stops_every_rank(tmp_path):
    plan = _write(tmp_path, "plan.yaml")

    outcomes = run_ranks(
        _stop, 2, [plan, plan], ["--report-more-at", "1"], init=False, timeout_s=60
    )

    _check(outcomes, r"loss function: reported=\['lm loss', 'squared loss'\] must be what .*first")


def test_save_that_would_lose_an_optimizer_stops_both(tmp_path):
    plan = tmp_path / "plan.yaml"
    text = PLAN.format(vision="", language="").replace("0-1, data_parallel_size: 2", "1")
    plan.write_text(text.replace("0-1, tensor_model_parallel_size: 2", "0"))
    plans = [str(plan)] * 2

    outcomes = run_ranks(_stop, 2, plans, ["--save", "x"], init=False, timeout_s=60)

    _check(outcomes, r"save=x must go with --use-distributed-optimizer")


def test_plans_that_differ_between_ranks_stop_both(tmp_path):
    plans = [_write(tmp_path, "a.yaml"), _write(tmp_path, "b.yaml", micro_batch_size="4")]

    outcomes = run_ranks(_stop, 2, plans, [], init=False, timeout_s=60)

    _check(outcomes, r"digest=\w+ on ranks \[1\] must equal")


def test_plan_that_one_rank_cannot_read_stops_both(tmp_path):
    plans = [_write(tmp_path, "a.yaml"), str(tmp_path / "none.yaml")]

    outcomes = run_ranks(_stop, 2, plans, [], init=False, timeout_s=60)

    _check(outcomes, r"none.yaml: file must be readable")


def _run_module(*arguments: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "RANK"}
    return subprocess.run(
        [sys.executable, "-m", "megatron_mosaic.run", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
        env=environment,
    )


def test_run_checks_the_plan_before_it_launches(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("print('started')\n")
    plan = _write(tmp_path, "plan.yaml", language=", pipeline_model_parallel_size: 2")

    done = _run_module(str(script), "--mosaic-plan", plan)

    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_run_refuses_megatron_from_two_places(tmp_path):
    checkout = tmp_path / "megatron" / "core"
    checkout.mkdir(parents=True)
    (checkout / "__init__.py").touch()
    script = tmp_path / "script.py"
    script.write_text("print('started')\n")

    done = _run_module(str(script), "--mosaic-plan", _write(tmp_path, "plan.yaml"))

    assert done.returncode == 2
    assert "must come from one place" in done.stderr


def test_packages_of_others_beside_a_checkout_are_no_second_megatron(tmp_path):
    # Megatron Energon is a distribution of its own, in the same namespace.
    for package in (
        "checkout/megatron/core",
        "checkout/megatron/training",
        "site/megatron/energon",
    ):
        (tmp_path / package).mkdir(parents=True)
        (tmp_path / package / "__init__.py").touch()
    code = (
        "from pathlib import Path; from megatron_mosaic.run import _check_one_megatron; "
        f"_check_one_megatron(Path({str(tmp_path / 'checkout' / 'script.py')!r}))"
    )

    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr


def test_run_without_a_plan_runs_the_script_as_it_is(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint(sys.argv[1:], __name__, 'megatron' in sys.modules)\n")

    done = _run_module(str(script), "--option", "value")

    assert done.stdout == "['--option', 'value'] __main__ False\n"
