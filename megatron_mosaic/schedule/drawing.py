"""A schedule as text for the terminal."""

import textwrap
from collections.abc import Collection, Iterable

from megatron_mosaic.layout.ranks import show_ranks
from megatron_mosaic.schedule.schedule import Schedule
from megatron_mosaic.schedule.task import Task


def draw(
    schedule: Schedule,
    *,
    ranks: Iterable[int] | None = None,
    width: int = 100,
    max_lines: int = 6,
) -> str:
    """Draws one row for every rank: its tasks in their order.

    Ranks with equal tasks share a row. A cell is the kind of the task and its microbatches; a
    prefix tells the module, and the language model has none.

    Args:
        schedule: The schedule.
        ranks: Ranks to draw; all by default.
        width: Columns of the terminal.
        max_lines: Lines of one row, at least 3; a longer one loses its middle.

    Returns:
        Lines without a final newline; the first explains the prefixes.
    """
    rows = _fold(schedule, range(len(schedule.tasks)) if ranks is None else ranks)
    prefixes = _prefixes({task.module for tasks in rows for task in tasks})
    where = [_where(members, width=width // 3) for members in rows.values()]
    stages = [_stages(tasks) for tasks in rows]
    lead_widths = max(map(len, where), default=0), max(map(len, stages), default=0)
    lines = [_legend(schedule, prefixes)]
    for tasks, *labels in zip(rows, where, stages, strict=True):
        lead = "".join(f"{label:{size}}  " for label, size in zip(labels, lead_widths, strict=True))
        cells = [prefixes[task.module] + _cell(task) for task in tasks]
        lines += _wrap(lead, cells, width=width, max_lines=max_lines)
    return "\n".join(lines)


def _fold(schedule: Schedule, ranks: Iterable[int]) -> dict[tuple[Task, ...], list[int]]:
    rows: dict[tuple[Task, ...], list[int]] = {}
    for rank in ranks:
        rows.setdefault(schedule.tasks[rank], []).append(rank)
    return rows


def _prefixes(modules: Collection[str]) -> dict[str, str]:
    """Shortest beginnings of the names that tell the modules beside the language model apart."""
    others = sorted(set(modules) - {"language"})
    prefixes = {"language": ""}
    for name in others:
        rivals = [other for other in others if other != name]
        lengths = range(1, len(name))
        prefixes[name] = next(
            (name[:n] for n in lengths if not any(r.startswith(name[:n]) for r in rivals)), name
        )
    return prefixes


def _legend(schedule: Schedule, prefixes: dict[str, str]) -> str:
    parts = [f"{prefix} = {name}" for name, prefix in prefixes.items() if prefix]
    count = f"{schedule.num_microbatches} microbatch{'es' * (schedule.num_microbatches > 1)}"
    passes = ", forward only" if schedule.forward_only else ""
    return "; ".join([count + passes, *parts])


def _where(ranks: list[int], *, width: int) -> str:
    label = f"rank{'s' if len(ranks) > 1 else ''} {show_ranks(ranks)}"
    return textwrap.shorten(label, width, placeholder=" ...]")


def _stages(tasks: tuple[Task, ...]) -> str:
    names = dict.fromkeys(f"{task.module}.{task.stage}" for task in tasks)
    return " ".join(names) or "idle"


def _cell(task: Task) -> str:
    return str(task).split(" ", maxsplit=1)[0]


def _wrap(lead: str, cells: list[str], *, width: int, max_lines: int) -> list[str]:
    """Breaks a row between cells; keeps its beginning and end if it is too long."""
    lines = [lead.rstrip()] if not cells else []
    room = max(width - len(lead), 1)
    for cell in cells:
        if lines and len(lines[-1]) + 1 + len(cell) <= len(lead) + room:
            lines[-1] += " " + cell
        else:
            lines.append((" " * len(lead) if lines else lead) + cell)
    if len(lines) > max_lines:
        num_shown = sum(
            len(line[len(lead) :].split()) for line in [*lines[: max_lines - 2], lines[-1]]
        )
        gap = f"... {len(cells) - num_shown} tasks ..."
        lines[max_lines - 2 : -1] = [" " * len(lead) + gap]
    return lines
