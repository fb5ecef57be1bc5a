"""Plans on a GPU train as on CPU: one rank over NCCL, and two that share the GPU over gloo."""

import time
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.measured import read_trace
from tests.gpu.on_gpu import record_on_gpu
from tests.parity.compare import Whole, whole
from tests.parity.record import OPTIMIZERS, record_plan
from tests.parity.training import options_of
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False"
)

TIMEOUT_S = 300
PLANS = Path(__file__).parent.parent / "plans"
ONE_RANK = PLANS / "one_rank.yaml"
RAGGED = ("--images", "ragged")
GLOO = ("--distributed-backend", "gloo")
# fp32 sums in another order differ by about 1e-6; three steps of training add to it.
FP32_BOUND = 1e-4
NOTICEABLE = 1e-3  # of the norm of all gradients: what is smaller is compared with that

# Rows cross between the ranks in both directions, and so do hidden states and their gradients.
PIPELINE_PLAN = """format: 1
world_size: 2
global_batch_size: 16
micro_batch_size: 2
modules:
  vision: {ranks: 0-1, data_parallel_size: 2}
  language: {ranks: 0-1, pipeline_model_parallel_size: 2}
edges: [[vision, language]]
schedule: {kind: colocated, encoder_group: 2}
"""
DISJOINT_PLAN = """format: 1
world_size: 2
global_batch_size: 16
micro_batch_size: 2
modules:
  vision: {ranks: 0}
  language: {ranks: 1}
edges: [[vision, language]]
schedule: {kind: 1f1b}
"""
LANES_PLAN = """format: 1
world_size: 1
global_batch_size: 16
micro_batch_size: 2
modules:
  vision: {ranks: 0, share: {sms: 32}}
  language: {ranks: 0}
edges: [[vision, language]]
schedule: {kind: concurrent, encoder_group: 2}
"""


@cache
def _on_cpu(plan: Path, options: tuple[str, ...]) -> Whole:
    arguments = (str(plan), list(options))
    world_size = Plan.load(plan).world_size
    return whole(run_ranks(record_plan, world_size, *arguments, init=False, timeout_s=TIMEOUT_S))


def _on_gpu(
    plan: Path, options: tuple[str, ...], *, on_side_stream: bool = False, connections: str = "1"
) -> Whole:
    return whole(
        run_ranks(
            record_on_gpu,
            Plan.load(plan).world_size,
            *(str(plan), list(options), on_side_stream, connections),
            init=False,
            fresh=True,
            timeout_s=TIMEOUT_S,
        )
    )


def _difference(run: Whole, reference: Whole) -> float:
    """Largest relative difference of a loss, a gradient or a weight, over all steps."""
    differences = []
    for own, other in zip(run.losses, reference.losses, strict=True):
        differences.append(_relative(np.array(own["lm loss"]), np.array(other["lm loss"])))
    for own, other in zip(run.gradients, reference.gradients, strict=True):
        assert set(own) == set(other)
        total = np.sqrt(sum(np.square(gradient).sum() for gradient in other.values()))
        floor = float(NOTICEABLE * total)
        differences += [_relative(own[name], other[name], floor=floor) for name in other]
    for own, other in zip(run.weights, reference.weights, strict=True):
        differences.append(_distance(own, other))
    return max(differences)


def _distance(own: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    assert set(own) == set(other)
    return max(_relative(own[name], other[name]) for name in other)


def _relative(own: np.ndarray, other: np.ndarray, *, floor: float = 1e-8) -> float:
    return float(np.linalg.norm(own - other) / max(float(np.linalg.norm(other)), floor))


@pytest.mark.parametrize("on_side_stream", [False, True], ids=["default_stream", "side_stream"])
def test_one_rank_in_fp32_trains_as_on_cpu(on_side_stream):
    options = (*OPTIMIZERS["sgd"], *RAGGED)

    run = _on_gpu(ONE_RANK, options, on_side_stream=on_side_stream)

    assert _difference(run, _on_cpu(ONE_RANK, options)) <= FP32_BOUND


def test_one_rank_in_bf16_is_as_near_to_fp32_as_on_cpu():
    options = (*OPTIMIZERS["adam"], *RAGGED)
    bf16 = (*options, "--bf16", "--use-distributed-optimizer", "--overlap-grad-reduce")

    run = _on_gpu(ONE_RANK, bf16)

    on_cpu, fp32 = _on_cpu(ONE_RANK, bf16), _on_cpu(ONE_RANK, options)
    assert len(run.losses) == 4
    for own, alike, exact in zip(run.losses, on_cpu.losses, fp32.losses, strict=True):
        loss, num_tokens = own["lm loss"]
        error = abs(alike["lm loss"][0] - exact["lm loss"][0])
        # Both round to 8 bits, 2e-3 of the value.
        assert abs(loss - exact["lm loss"][0]) <= max(3 * error, 2e-3 * exact["lm loss"][0])
        assert num_tokens == exact["lm loss"][1]


def test_dropout_on_the_gpu_continues_where_a_checkpoint_stopped(tmp_path):
    folder = str(tmp_path / "checkpoints")
    options = (*OPTIMIZERS["adam"], *RAGGED)
    dropout = (*options, "--attention-dropout", "0.1", "--hidden-dropout", "0.1")

    through = _on_gpu(ONE_RANK, (*dropout, "--save", folder, "--save-interval", "2"))
    resumed = _on_gpu(ONE_RANK, (*dropout, "--load", folder, "--ckpt-step", "2"))

    assert len(resumed.losses) == 2
    without = _on_cpu(ONE_RANK, options)
    assert _distance(resumed.weights[-1], through.weights[-1]) <= FP32_BOUND
    # Other masks would be seen.
    assert _distance(without.weights[-1], through.weights[-1]) > 10 * FP32_BOUND


@pytest.mark.parametrize(
    "plan",
    ["colocated_v2_l2", "colocated_vtp2_ldp2", PIPELINE_PLAN, DISJOINT_PLAN],
    ids=["data_to_tensor", "tensor_to_data", "pipeline", "disjoint"],
)
def test_two_ranks_on_one_gpu_train_as_on_cpu(tmp_path, plan):
    path = PLANS / f"{plan}.yaml"
    if "\n" in plan:
        path = tmp_path / "plan.yaml"
        path.write_text(f"# options: {' '.join(RAGGED)}\n{plan}")
    options = (*OPTIMIZERS["sgd"], *options_of(path))

    run = _on_gpu(path, (*options, *GLOO))

    assert _difference(run, _on_cpu(path, options)) <= FP32_BOUND


@pytest.mark.parametrize("on_side_stream", [False, True], ids=["default_stream", "side_stream"])
@pytest.mark.parametrize("sharing", ["strict", "priority", "serial"])
def test_modules_that_run_at_the_same_time_train_as_on_cpu(tmp_path, sharing, on_side_stream):
    path = tmp_path / "plan.yaml"
    path.write_text(f"# options: {' '.join(RAGGED)}\n{LANES_PLAN}")
    options = (*OPTIMIZERS["sgd"], *options_of(path))

    run = _on_gpu(
        path,
        (*options, "--mosaic-sharing", sharing),
        on_side_stream=on_side_stream,
        connections="8",
    )

    assert _difference(run, _on_cpu(path, options)) <= FP32_BOUND


def test_tasks_are_traced_by_the_clock_of_the_gpu(tmp_path):
    began_s = time.time()

    _on_gpu(ONE_RANK, (*OPTIMIZERS["sgd"], *RAGGED, "--mosaic-trace", str(tmp_path)))

    schedule = build_schedule(Plan.load(ONE_RANK))
    steps = read_trace(tmp_path)
    assert [step.number for step in steps] == [0, 1, 2, 3]
    for step in steps:
        assert tuple(span.task for span in step.spans[0]) == schedule.tasks[0]
        # A stream runs one task after the other; events are half a microsecond exact.
        times_s = [time_s for span in step.spans[0] for time_s in (span.start_s, span.end_s)]
        assert all(later - earlier > -1e-6 for earlier, later in pairwise(times_s))
        assert 0 < step.makespan_s < time.time() - began_s
