"""What the page of a report draws, as one compact document."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.layout.ranks import show_ranks
from megatron_mosaic.report.lanes import quotas
from megatron_mosaic.report.palette import MEMORY_COLORS, TIME_COLORS, module_colors
from megatron_mosaic.report.prediction import Memory, Prediction
from megatron_mosaic.report.step import Measured, MeasuredRow, ReportedStep
from megatron_mosaic.report.summary import in_brackets, key_numbers, summary
from megatron_mosaic.schedule.graph import RankKind, show_stages
from megatron_mosaic.schedule.program import Integers, Program, TaskArrays
from megatron_mosaic.schedule.simulate import Seconds

_SIZES = {
    "tensor_model_parallel_size": "TP",
    "context_parallel_size": "CP",
    "data_parallel_size": "DP",
    "pipeline_model_parallel_size": "PP",
    "virtual_pipeline_model_parallel_size": "VPP",
    "expert_model_parallel_size": "EP",
}


class Drawn(NamedTuple):
    """A layout whose step the page draws.

    Args:
        title: What it is, and how long it takes.
        prediction: What is predicted of it.
        step: Its step.
    """

    title: str
    prediction: Prediction
    step: ReportedStep


def page_data(
    plan: Plan, own: Drawn, *, name: str, baseline: Drawn | None = None
) -> dict[str, Any]:
    """Gathers what the page shows.

    Tasks are columns of numbers, once each, whatever number of ranks runs them; times are whole
    microseconds. The columns of the baseline stand behind those of the plan.

    Args:
        plan: The plan.
        own: Its step.
        name: Of the plan file.
        baseline: The homogeneous layout's step.
    """
    layouts = [own, baseline] if baseline else [own]
    own_quotas = quotas(plan)
    program, measured = own.step.timeline.program, own.step.measured
    modules = module_colors(
        stage.module for each in layouts for stage in each.step.timeline.program.stages
    )
    return {
        "name": name,
        "title": _title(plan),
        "summary": summary(own.prediction, own.step),
        "numbers": [number._asdict() for number in key_numbers(own.prediction, own.step)],
        "source": own.step.source,
        "modules": [
            {"name": module, "colors": list(pair), "quota": own_quotas.get(module)}
            for module, pair in modules.items()
        ],
        "layouts": [{"title": each.title, "once_us": _once_us(each)} for each in layouts],
        **_columns(layouts, list(modules), own_quotas),
        "measured": _measured(measured, program) if measured else None,
        "durations": _durations(own.prediction, measured) if measured else [],
        "breakdown": _breakdown(own.prediction),
        "capacity_bytes": own.prediction.capacity_bytes,
        "colors": {"memory": dict(MEMORY_COLORS), "time": dict(TIME_COLORS)},
        "plan": {"rows": list(_plan_rows(plan)), "facts": _facts(plan), "yaml": plan.to_yaml()},
    }


def _title(plan: Plan) -> str:
    modules = " + ".join((*plan.encoders, "language"))
    return f"{modules} on {plan.world_size:,} rank{'s' * (plan.world_size > 1)}"


def _columns(
    layouts: Sequence[Drawn], modules: Sequence[str], quotas: Mapping[str, str]
) -> dict[str, Any]:
    """Stages, kinds of ranks and tasks of all layouts, one behind the other."""
    stages: list[dict[str, Any]] = []
    kinds: list[dict[str, Any]] = []
    tasks: dict[str, list[int]] = {name: [] for name in TaskArrays._fields}
    simulated: dict[str, list[int]] = {name: [] for name in ("start_us", "duration_us", "behind")}
    for layout, (_, prediction, step) in enumerate(layouts):
        program, first_stage = step.timeline.program, len(stages)
        stages += [
            {
                "module": modules.index(stage.module),
                "stage": stage.stage,
                "task_bytes": prediction.task_bytes.get(stage),
            }
            for stage in program.stages
        ]
        for kind in program.kinds:
            written = _kind(program, kind, prediction.memory, first_stage=first_stage)
            written["lanes"] = _lanes(program, kind, first_stage=first_stage, quotas=quotas)
            kinds.append({"layout": layout, **written})
        columns = program.tasks._replace(stage=program.tasks.stage + first_stage)
        for name, column in columns._asdict().items():
            tasks[name] += column.tolist()
        for name, column in _simulated(step).items():
            simulated[name] += column
    return {"stages": stages, "kinds": kinds, "tasks": tasks, "simulated": simulated}


def _kind(
    program: Program, kind: RankKind, memory: Iterable[Memory], *, first_stage: int
) -> dict[str, Any]:
    terms = next((bar.terms for bar in memory if bar.holds(kind.ranks[0])), None)
    stages = np.unique(program.tasks.stage[program.tasks_of(kind)]).tolist()
    return {
        "ranks": show_ranks(kind.ranks).strip("[]"),
        "num_ranks": len(kind.ranks),
        "stages": [first_stage + stage for stage in stages],
        "label": " + ".join(show_stages(program.stages[stage] for stage in stages)),
        "memory": dict(terms) if terms else None,
    }


def _lanes(
    program: Program, kind: RankKind, *, first_stage: int, quotas: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Lanes of ranks of a kind, each a row of its own; none where modules take turns."""
    lanes = program.lane_tasks(kind)
    if len(lanes) == 1:
        return []
    return [
        {
            "stages": (first_stage + np.unique(program.tasks.stage[lane.tasks])).tolist(),
            "label": " ".join(show_stages(lane.stages))
            + in_brackets(quotas.get(lane.stages[0].module, "")),
        }
        for lane in lanes
    ]


def _simulated(step: ReportedStep) -> dict[str, list[int]]:
    times_us = _times_us(step.timeline.start_s, step.timeline.end_s)
    return {**times_us, "behind": _behind(step.after)}


def _once_us(drawn: Drawn) -> dict[str, int]:
    """Microseconds of what a step does once after its tasks, by term, where that is known."""
    if drawn.step.source != "predicted":
        return {}
    terms = drawn.prediction.breakdown
    return {term: _us(terms[term]) for term in ("sync_s", "optimizer_s") if term in terms}


def _measured(measured: Measured, program: Program) -> dict[str, Any]:
    return {
        "step": measured.step,
        "steps_us": [_us(each) for each in measured.steps_s],
        "num_ranks": measured.num_ranks,
        "behind": _behind(measured.after),
        "rows": [_measured_row(row, program) for row in measured.rows],
    }


def _durations(prediction: Prediction, measured: Measured) -> list[dict[str, Any]]:
    """Predicted and measured durations of the longest tasks of every stage."""
    return [
        {
            "stage": f"{stage.module}.{stage.stage}",
            "predicted_us": [_us(time_s) for time_s in times],
            "measured_us": [_us(time_s) for time_s in measured.tasks_s[stage]],
        }
        for stage, times in prediction.tasks_s.items()
        if stage in measured.tasks_s
    ]


def _measured_row(row: MeasuredRow, program: Program) -> dict[str, Any]:
    """A row; its tasks are named only where they ran in another order than the schedule's."""
    own = program.tasks_of(program.kinds[row.kind])
    index = None if np.array_equal(row.index, own) else row.index.tolist()
    times = _times_us(row.start_s, row.end_s)
    return {"rank": row.rank, "kind": row.kind, "index": index, **times}


def _times_us(start_s: Seconds, end_s: Seconds) -> dict[str, list[int]]:
    start_us = np.rint(start_s * 1e6).astype(np.int64)
    end_us = np.rint(end_s * 1e6).astype(np.int64)
    return {"start_us": start_us.tolist(), "duration_us": (end_us - start_us).tolist()}


def _behind(after: Integers) -> list[int]:
    """How many tasks back the one is that a task waited for last; 0 if there is none."""
    return np.where(after < 0, 0, np.arange(len(after)) - after).tolist()


def _breakdown(prediction: Prediction) -> list[dict[str, Any]]:
    rows = [("this plan", "", prediction.step_s, prediction.breakdown)]
    other = prediction.baseline_breakdown
    rows.append(("homogeneous", prediction.baseline_layout, prediction.baseline_step_s, other))
    return [
        {"name": name, "layout": layout, "terms": dict(terms), "step_s": step_s}
        for name, layout, step_s, terms in rows
        if terms
    ]


def _plan_rows(plan: Plan) -> Iterable[Mapping[str, Any]]:
    named, own = any(map(_loads, plan.modules.values())), quotas(plan)
    for name, placement in plan.modules.items():
        written = asdict(placement)
        yield {
            "module": name,
            "ranks": show_ranks(placement.ranks).strip("[]"),
            **{short: written[field] for field, short in _SIZES.items()},
            "layers": _layers(placement.layers_per_stage),
            "trainable": _trainable(placement.trainable),
            "recompute": placement.recompute or "as the script says",
            **({"loads": _loads(placement)} if named else {}),
            **({"share": own.get(name, "all SMs")} if own else {}),
        }


def _loads(placement: ModulePlacement) -> str:
    """Mask of the language model, and what evens out the loads of a module's ranks."""
    words = [f"items {placement.items}"] if placement.items != "in_order" else []
    if attention := placement.attention:
        words.append(attention.mask)
        if placement.context_parallel_size > 1:
            words += [f"tokens {attention.tokens}", f"keys {attention.keys}"]
    return ", ".join(words)


def _layers(layers_per_stage: Sequence[int] | None) -> str:
    return "evenly" if layers_per_stage is None else ", ".join(map(str, layers_per_stage))


def _trainable(trainable: Sequence[str] | None) -> str:
    if trainable is None:
        return "everything"
    return ", ".join(trainable) or "nothing"


def _facts(plan: Plan) -> dict[str, str]:
    schedule = plan.schedule
    facts = {
        "schedule": schedule.kind,
        "global batch": f"{plan.global_batch_size:,} samples",
        "micro batch": _counted(plan.micro_batch_size, "sample"),
        "microbatches": f"{plan.num_microbatches:,} a step",
    }
    if plan.encoders and schedule.kind in ("colocated", "bubble_fill", "concurrent"):
        group = schedule.group_size(plan.num_microbatches)
        facts["encoder task"] = _counted(group, "microbatch", "microbatches")
    if schedule.max_live is not None:
        facts["live encoder tasks"] = f"at most {schedule.max_live}"
    if schedule.ahead:
        facts["frozen encoders"] = "a step ahead"
    return facts


def _counted(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _us(value_s: float) -> int:
    return round(value_s * 1e6)
