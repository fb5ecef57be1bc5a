"""Simulated steps as rows of tasks."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch

from megatron_mosaic.layout.ranks import show_ranks
from megatron_mosaic.report.palette import module_colors
from megatron_mosaic.report.summary import in_brackets
from megatron_mosaic.report.units import seconds
from megatron_mosaic.schedule.graph import RankKind, show_stages
from megatron_mosaic.schedule.program import LaneTasks
from megatron_mosaic.schedule.simulate import Timeline
from megatron_mosaic.schedule.task_arrays import Integers

_MOST_ROWS = 20
_LEAST_LABELLED_SHARE = 0.014  # of the step, at the smallest legible size


def timeline_height(timeline: Timeline) -> float:
    """Inches that the drawing takes."""
    return 1.3 + 0.3 * len(_rows(timeline))


class _Row(NamedTuple):
    """Ranks of a kind, or one of their lanes.

    Args:
        kind: The kind of ranks.
        is_first: Whether it is the first row of the kind.
        lane: What runs in the row.
    """

    kind: RankKind
    is_first: bool
    lane: LaneTasks


def draw_timelines(
    figure: Figure | SubFigure,
    timelines: Mapping[str, Timeline],
    *,
    predicted: bool,
    quotas: Mapping[str, str],
) -> None:
    """Draws steps below each other on one scale of time, and a legend of their tasks.

    Args:
        figure: Where to draw.
        timelines: The steps by the names of their layouts.
        predicted: Whether durations are predictions; else they are those of an example.
        quotas: What modules have of their GPUs while others run there.
    """
    heights = [timeline_height(timeline) for timeline in timelines.values()]
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)
    stages = [stage for each in timelines.values() for stage in each.program.stages]
    colors = module_colors(stage.module for stage in stages)
    span_s = max(timeline.makespan_s for timeline in timelines.values())
    panels[-1, 0].set_xlim(0, span_s or 1.0)
    panels[-1, 0].set_xlabel("seconds; a number is the first microbatch of its task")
    for axes, (name, timeline) in zip(panels[:, 0], timelines.items(), strict=True):
        _draw_step(axes, timeline, colors=colors)
        axes.set_title(_title(timeline, name=name, predicted=predicted))
    handles = [
        Patch(color=colors[module][backward], label=f"{module} {name}{in_brackets(quota)}")
        for module in colors
        for quota in [quotas.get(module, "")]
        for backward, name in enumerate(("forward", "backward"))
        if any(_runs(timeline, module, backward=backward) for timeline in timelines.values())
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 7), fontsize=8
    )


def _draw_step(axes: Axes, timeline: Timeline, *, colors: Mapping[str, tuple[str, str]]) -> None:
    """Draws a row for each lane of a kind of rank; numbers are the first microbatches of tasks."""
    rows = _rows(timeline)
    for place, row in enumerate(rows):
        if row.is_first and place and len(rows) > len(_kinds(timeline)):
            axes.axhline(place - 0.5, color="#cccccc", linewidth=0.6, zorder=0)
        _draw_row(axes, timeline, row.lane.tasks, place=place, colors=colors)
    labels = [
        f"{_where(row.kind) + '  ' if row.is_first else ''}{' '.join(show_stages(row.lane.stages))}"
        for row in rows
    ]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)


def _rows(timeline: Timeline) -> list[_Row]:
    """Rows to draw: a lane of a kind of ranks each."""
    return [
        _Row(kind, number == 0, lane)
        for kind in _kinds(timeline)
        for number, lane in enumerate(timeline.program.lane_tasks(kind))
    ]


def _kinds(timeline: Timeline) -> Sequence[RankKind]:
    """Kinds of ranks to draw: all, or the first of every module and some of the others."""
    program = timeline.program
    kinds = program.kinds
    most_lanes = max(len(program.lane_tasks(kind)) for kind in kinds)
    if len(kinds) * most_lanes <= _MOST_ROWS:
        return kinds
    first = {stage.module: k for k, kind in reversed([*enumerate(kinds)]) for stage in kind.stages}
    rest = [k for k in range(len(kinds)) if k not in first.values()]
    others = max(_MOST_ROWS // most_lanes - len({*first.values()}), 0)
    spread = np.linspace(0, len(rest) - 1, min(others, len(rest))).round().astype(int)
    return [kinds[k] for k in sorted({*first.values(), *(rest[n] for n in spread)})]


def _runs(timeline: Timeline, module: str, *, backward: int) -> bool:
    tasks, stages = timeline.program.tasks, timeline.program.stages
    own = [s for s, stage in enumerate(stages) if stage.module == module]
    return bool(np.any(np.isin(tasks.stage, own) & (tasks.backward == backward)))


def _draw_row(
    axes: Axes,
    timeline: Timeline,
    index: Integers,
    *,
    place: int,
    colors: Mapping[str, tuple[str, str]],
) -> None:
    program = timeline.program
    start_s = timeline.start_s[index]
    width_s = timeline.end_s[index] - start_s
    look = [
        (program.stages[stage].module, int(backward))
        for stage, backward in zip(
            program.tasks.stage[index], program.tasks.backward[index], strict=True
        )
    ]
    edge = 0.5 if len(index) < 150 else 0.0
    for module, backward in dict.fromkeys(look):
        own = [n for n, each in enumerate(look) if each == (module, backward)]
        axes.broken_barh(
            [(start_s[n], width_s[n]) for n in own],
            (place - 0.4, 0.8),
            facecolors=colors[module][backward],
            edgecolor="white",
            linewidth=edge,
        )
    for n, (_, backward) in enumerate(look):
        if width_s[n] > _LEAST_LABELLED_SHARE * timeline.makespan_s:
            axes.text(
                start_s[n] + width_s[n] / 2,
                place,
                f"{program.tasks.first[index[n]]}",
                ha="center",
                va="center",
                fontsize=7,
                color="#333333" if backward else "white",
            )


def _where(kind: RankKind) -> str:
    shown = show_ranks(kind.ranks)
    if len(shown) > 18:
        shown = f"{kind.ranks[0]}, ..., {kind.ranks[-1]}"
    return f"rank{'s' if len(kind.ranks) > 1 else ''} {shown}"


def _title(timeline: Timeline, *, name: str, predicted: bool) -> str:
    kinds = _kinds(timeline)
    waits = [timeline.bubble_s(kind) / (timeline.makespan_s or 1.0) for kind in kinds]
    of = f" of {name}" if name else ""
    parts = [f"Tasks of one step{of}, {seconds(timeline.makespan_s)}"]
    if not predicted:
        parts = [
            "Tasks of one step if a microbatch took 1 s forward and 2 s backward on every stage"
        ]
    shares = sorted({f"{wait:.0%}": wait for wait in waits}.items(), key=lambda item: item[1])
    span = " to ".join(dict.fromkeys((shares[0][0], shares[-1][0])))
    parts.append(f"ranks wait {span} of it")
    hidden = len(timeline.program.kinds) - len(kinds)
    if hidden:
        parts.append(f"{hidden} kinds of ranks left out")
    return ", ".join(parts)
