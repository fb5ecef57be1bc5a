"""Plans that reports are tested with, and traces of them as a run writes them."""

import json
from dataclasses import replace

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.report.prediction import predicted_timeline, read_prediction

PLAN = """\
format: 1
world_size: 4
global_batch_size: 4
micro_batch_size: 1
modules:
  vision: {ranks: 0-1, data_parallel_size: 2}
  language: {ranks: 2-3, pipeline_model_parallel_size: 2}
edges: [[vision, language]]
schedule: {kind: 1f1b}
"""
PREDICTED = """\
predicted:
  step_s: 2.0
  baseline_step_s: 3.0
  breakdown: {compute_s: 1.0, communication_s: 0.2, bubble_s: 0.7, sync_s: 0.06, optimizer_s: 0.04}
  baseline:
    breakdown: {compute_s: 2.0, communication_s: 0.5, bubble_s: 0.5, sync_s: 0.0, optimizer_s: 0.0}
    layout: TP2 PP2
  memory_bytes:
  - {ranks: 0-1, weights: 10737418240, gradients: 21474836480, working: 0}
  - {ranks: 2-3, weights: 32212254720, optimizer: 10737418240, activations: 10737418240}
  capacity_bytes: 85899345920
  tasks_s:
    vision.0: [1.0, 1.0]
    language.0: [1.0, 2.0]
    language.1: [1.0, 2.0]
  transfers_s: {vision.0 -> language.0: 1.0}
"""
TASK_BYTES = """\
  task_bytes: {vision.0: 1073741824, language.0: 5368709120, language.1: 10737418240}
"""


def small_plan(predicted=PREDICTED + TASK_BYTES):
    return Plan.loads(PLAN + predicted, where="plan.yaml")


LAYOUT_NOTE = "    layout: TP2 PP2\n"
BASELINE_NOTES = """\
    plan:
      micro_batch_size: 1
      modules:
        vision: {ranks: 0-1, tensor_model_parallel_size: 2}
        language: {ranks: 0-3, tensor_model_parallel_size: 2, pipeline_model_parallel_size: 2}
      schedule: {kind: colocated, encoder_group: 1}
    step_s: 3.0
    tasks_s:
      vision.0: [2.0, 2.0]
      language.0: [2.0, 4.0]
      language.1: [2.0, 4.0]
"""


def compared_plan():
    """The small plan with its homogeneous one: vision on the first stage of language."""
    return small_plan(PREDICTED.replace(LAYOUT_NOTE, LAYOUT_NOTE + BASELINE_NOTES) + TASK_BYTES)


def filled_plan():
    """Encoder tasks in the waits of the language model, on each rank where it has them."""
    return Plan.loads(
        """\
format: 1
world_size: 2
global_batch_size: 4
micro_batch_size: 1
modules:
  vision: {ranks: 0-1, data_parallel_size: 2}
  language: {ranks: 0-1, pipeline_model_parallel_size: 2}
edges: [[vision, language]]
schedule: {kind: bubble_fill}
""",
        where="plan.yaml",
    )


LANES = """\
  lanes:
    tasks_s:
      vision.0: [2.0, 2.0]
      language.0: [1.0, 2.0]
      language.1: [1.0, 2.0]
    slowdown:
      F vision.0 + F language.0: [1.5, 1.0]
"""


def lanes_plan(predicted=PREDICTED + TASK_BYTES + LANES):
    """Two replicas of vision that run at the same time as a pipeline, with 32 multiprocessors."""
    source = PLAN.replace("world_size: 4", "world_size: 2").replace("ranks: 2-3", "ranks: 0-1")
    source = source.replace("data_parallel_size: 2}", "data_parallel_size: 2, share: {sms: 32}}")
    predicted = predicted.replace("ranks: 2-3, ", "ranks: 9, ")
    return Plan.loads(source.replace("kind: 1f1b", "kind: concurrent") + predicted, "plan.yaml")


def large_plan():
    """4,096 ranks: 32 stages with 128 ranks each, and an encoder on half of them."""
    return Plan.loads(
        """\
format: 1
world_size: 4096
global_batch_size: 8192
micro_batch_size: 1
modules:
  vision: {ranks: 0-2047, data_parallel_size: 512, tensor_model_parallel_size: 4}
  language:
    ranks: 0-4095
    tensor_model_parallel_size: 4
    data_parallel_size: 32
    pipeline_model_parallel_size: 32
edges: [[vision, language]]
schedule: {kind: colocated, encoder_group: 8}
""",
        where="plan.yaml",
    )


def large_compared_plan():
    """The same with times, and as its homogeneous plan one with twice as many microbatches."""
    plan = large_plan()
    stages = ["vision.0", *(f"language.{stage}" for stage in range(32))]
    tasks_s = {stage: [0.0101, 0.0203] for stage in stages}
    sizes = {"tensor_model_parallel_size": 8, "data_parallel_size": 16}
    modules = {**plan.modules, "language": replace(plan.language, **sizes)}
    other = replace(plan, modules=modules)
    baseline = {"plan": other.layout_notes(), "step_s": 9.0, "tasks_s": tasks_s}
    predicted = {"step_s": 8.0, "tasks_s": tasks_s, "baseline": baseline}
    return replace(plan, predicted=predicted)


def write_trace(plan, folder, *, slower=1.25, steps=3):
    """Writes what a run would have, had all of it taken some times as long as predicted."""
    timeline = predicted_timeline(plan, read_prediction(plan))
    folder.mkdir()
    for kind in timeline.program.kinds:
        lines = [
            json.dumps(
                {
                    "step": step,
                    **span.task._asdict(),
                    "start_s": 100.0 * step + slower * span.start_s,
                    "end_s": 100.0 * step + slower * span.end_s,
                }
            )
            for step in range(steps)
            for span in timeline.spans(kind)
        ]
        for rank in kind.ranks:
            (folder / f"rank{rank}.jsonl").write_text("".join(f"{line}\n" for line in lines))
