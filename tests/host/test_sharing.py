"""Whether modules may share GPUs is decided before any group exists, and alike on all ranks."""

import importlib
import re
import sys

import pytest
import torch.distributed as dist

from tests.parity.record import ARGUMENTS, OPTIMIZERS
from tests.ranks import run_ranks

PLAN = """
format: 1
world_size: 2
global_batch_size: 4
micro_batch_size: 2
modules:
  vision: {ranks: 0-1, data_parallel_size: 2, share: {sms: 32}}
  language: {ranks: 0-1, tensor_model_parallel_size: 2}
edges: [[vision, language]]
schedule: {kind: concurrent}
"""
SERIAL = PLAN.replace(", share: {sms: 32}", "").replace("concurrent", "colocated")
HOPPER = r"modules language: tensor_model_parallel_size .* must be 1 .* 9\.0, .*; use data or pipe"


class _Lines:
    """Keeps what is written."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)

    def flush(self):
        pass


def _run(rank, plan, options, hopper_ranks=()):
    """Runs the script, on some ranks as if on a Hopper GPU. Returns how it ended."""
    from megatron_mosaic.host.cpu import run_on_cpu

    run_on_cpu()
    from megatron_mosaic.host import sharing
    from megatron_mosaic.host.arguments import parse_and_validate_args
    from megatron_mosaic.host.training import pretrain
    from megatron_mosaic.sharing.guards import Environment

    if rank in hopper_ranks:
        facts = Environment(compute_capability=(9, 0), model_parallel=("language",))
        sharing.environment_of = lambda *unused: facts
    sys.stdout, sys.stderr = _Lines(), _Lines()
    short = ["--train-iters", "1", "--eval-iters", "0", "--global-batch-size", "4"]
    sys.argv = ["script", *ARGUMENTS, *OPTIMIZERS["sgd"], *short, *options, "--mosaic-plan", plan]
    code = 0
    try:
        script = importlib.import_module("tests.parity.vlm_script")
        script.main(parse_and_validate_args, pretrain)
    except SystemExit as stopped:
        code = stopped.code
    errors = [line for line in sys.stderr.text.splitlines() if line.startswith("error: ")]
    logged = [line for line in sys.stdout.text.splitlines() if "lanes: " in line]
    return code, errors, logged, dist.is_initialized()


def _ends(tmp_path, text, *options, hopper_ranks=()):
    plan = tmp_path / "plan.yaml"
    plan.write_text(text)
    return run_ranks(_run, 2, str(plan), list(options), hopper_ranks, init=False, timeout_s=60)


def _assert_stopped(ends, pattern):
    assert [code for code, *_ in ends] == [2, 2]
    ((line,),) = [errors for _, errors, _, _ in ends if errors]
    assert re.search(pattern, line), line
    assert not any(has_groups for *_, has_groups in ends)


@pytest.mark.parametrize("mode", ["strict", "green"])
@pytest.mark.parametrize("hopper_ranks", [(0, 1), (1,)])
def test_gpu_that_cannot_be_shared_stops_every_rank_with_one_line(tmp_path, mode, hopper_ranks):
    ends = _ends(tmp_path, PLAN, "--mosaic-sharing", mode, hopper_ranks=hopper_ranks)

    _assert_stopped(ends, HOPPER)


@pytest.mark.parametrize(
    ("text", "mode", "pattern"),
    [
        (PLAN, "priority", r"mosaic_sharing=priority must have a GPU, not cpu; use auto"),
        (PLAN, "fair", r"mosaic_sharing=fair must be one of auto, strict, .*; name one"),
        (SERIAL, "strict", r"mosaic_sharing=strict must go with kind=concurrent, not colocated"),
    ],
)
def test_wish_that_cannot_be_met_stops_every_rank_with_one_line(tmp_path, text, mode, pattern):
    _assert_stopped(_ends(tmp_path, text, "--mosaic-sharing", mode), pattern)


def test_auto_runs_one_module_after_the_other_and_says_once_why(tmp_path):
    (code, errors, logged, _), other = _ends(tmp_path, PLAN, hopper_ranks=(0, 1))

    assert (code, errors) == (0, [])
    (line,) = logged
    assert line.startswith("mosaic: lanes: none, modules run one after the other (modules language")
    assert line.endswith("or kind=colocated)")
    assert other[:3] == (0, [], [])


def test_lanes_that_ranks_have_otherwise_are_named_with_their_ranks(tmp_path):
    (code, _, (line,), _), _ = _ends(tmp_path, PLAN, hopper_ranks=(1,))

    assert code == 0
    assert "mosaic: ranks 0 lanes: virtual, " in line
    assert "; ranks 1 lanes: none, modules run one after the other (modules language" in line


def test_plan_without_lanes_has_no_trace_of_them(tmp_path):
    (_, _, logged, _), _ = _ends(tmp_path, SERIAL)

    assert logged == []
