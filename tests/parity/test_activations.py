"""Activations: what recomputation gives back bit by bit, and how long graphs live."""

import re
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.measured import read_trace
from megatron_mosaic.schedule.schedule import Schedule, peak_live
from tests.parity.compare import whole
from tests.parity.record import OPTIMIZERS, record_plan
from tests.parity.training import TIMEOUT_S, options_of
from tests.ranks import run_ranks

PLANS = Path(__file__).parent.parent / "plans"
DROPOUT = ["--attention-dropout", "0.1", "--hidden-dropout", "0.1"]
PLAN = """format: 1
world_size: 4
global_batch_size: 16
micro_batch_size: 2
modules:
  vision:
    {{ranks: 0-3, tensor_model_parallel_size: 2, data_parallel_size: 2{recompute}}}
  language:
    {{ranks: 0-3, tensor_model_parallel_size: 2, pipeline_model_parallel_size: 2{recompute}}}
edges: [[vision, language]]
schedule: {{kind: colocated, encoder_group: 2}}
"""
# Its gradient arrives in another memory layout, so the sum over the tokens rounds otherwise.
ROUNDED = ("vision_model.ln_pre.weight",)


def _train(folder: Path, recompute: str, options: list[str]):
    plan = folder / "plan.yaml"
    plan.write_text(PLAN.format(recompute=recompute))
    arguments = [*OPTIMIZERS["sgd"], *options]
    return whole(run_ranks(record_plan, 4, str(plan), arguments, init=False, timeout_s=TIMEOUT_S))


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_recomputation_draws_the_same_dropout(tmp_path, kind):
    options = ["--images", "ragged", *DROPOUT]
    kept = _train(tmp_path, "", options)

    recomputed = _train(tmp_path, f", recompute: {kind}", options)

    assert recomputed.losses == kept.losses
    for own, other in zip(recomputed.gradients, kept.gradients, strict=True):
        for name, gradient in other.items():
            if name in ROUNDED:
                np.testing.assert_allclose(own[name], gradient, rtol=1e-5, atol=1e-9)
            else:
                np.testing.assert_array_equal(own[name], gradient, name)


def test_dropout_changes_the_run(tmp_path):
    assert (
        _train(tmp_path, "", ["--images", "ragged", *DROPOUT]).losses
        != _train(tmp_path, "", ["--images", "ragged"]).losses
    )


class _Saved:
    """A tensor that a graph keeps, as long as it does."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def _watch(rank: int, plan: str, options: list[str]):
    """Trains, and returns by module the most tasks with a live graph at once, and what is wrong."""
    from megatron_mosaic.host.cpu import run_on_cpu

    run_on_cpu()
    from megatron_mosaic.host.runner import ModuleRunner

    alive: Counter = Counter()  # tensors kept, by task
    peak: Counter = Counter()
    wrong: list[str] = []
    forward, backward = ModuleRunner.forward, ModuleRunner.backward

    def watched_forward(runner, task, received):
        key = (task.module, task.stage, task.microbatches)

        def pack(tensor):
            saved = _Saved(tensor)
            alive[key] += 1
            weakref.finalize(saved, alive.subtract, [key])
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            leaving = forward(runner, task, received)
        live = sum(alive[key] > 0 for key in alive if key[0] == task.module)
        peak[task.module] = max(peak[task.module], live)
        for kept in runner._live.values():
            if kept is not None and kept.output.untyped_storage().nbytes() > 8:
                wrong.append(f"{task}: the output's values are kept")
        return leaving

    def watched_backward(runner, task, received):
        gradients = backward(runner, task, received)
        if alive[task.module, task.stage, task.microbatches]:
            wrong.append(f"{task}: its graph is alive")
        return gradients

    for method, watched in (("forward", watched_forward), ("backward", watched_backward)):
        setattr(ModuleRunner, method, watched)
    record_plan(rank, plan, options)
    return dict(peak), wrong


@pytest.mark.parametrize(
    "name",
    [
        "colocated_v2_l2pp2",
        "disjoint_vtp2_ltp2pp2",
        "colocated_v4_l2pp2_three_phase",
        "recompute_full_frozen_embedding",
        "lora_vision",
        "fill_virtual",
    ],
)
def test_graphs_live_as_long_as_the_schedule_says(name, tmp_path):
    path = PLANS / f"{name}.yaml"
    options = re.sub(r"--images \w+", "--images one", " ".join(options_of(path))).split()
    plan = Plan.load(path)
    schedule = build_schedule(plan)

    outcomes = run_ranks(
        _watch,
        plan.world_size,
        str(path),
        [*OPTIMIZERS["adam"], *options, "--mosaic-trace", str(tmp_path)],
        init=False,
        timeout_s=TIMEOUT_S,
    )

    _check_trace(tmp_path, schedule)
    for rank, (peak, wrong) in enumerate(outcomes):
        assert not wrong, wrong[0]
        for module in plan.modules_of(rank):
            has_backward = any(
                task.kind == "B" and task.module == module for task in schedule.tasks[rank]
            )
            expected = peak_live(schedule, rank, module) if has_backward else 0
            assert peak[module] == expected, (rank, module)


def _check_trace(folder: Path, schedule: Schedule) -> None:
    """Every rank traced its tasks one after the other, in training and not in evaluation."""
    steps = read_trace(folder)
    assert [step.number for step in steps] == [0, 1, 2, 3]
    for step in steps:
        for rank, tasks in enumerate(schedule.tasks):
            spans = step.spans.get(rank, ())
            assert tuple(span.task for span in spans) == tasks
            times_s = [time_s for span in spans for time_s in (span.start_s, span.end_s)]
            assert times_s == sorted(times_s)
