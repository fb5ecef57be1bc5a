"""A schedule as text for the terminal."""

import textwrap
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from megatron_mosaic.layout.ranks import show_ranks
from megatron_mosaic.schedule.graph import show_stages
from megatron_mosaic.schedule.schedule import Schedule
from megatron_mosaic.schedule.task import Task


def draw(
    schedule: Schedule,
    *,
    ranks: Iterable[int] | None = None,
    width: int = 100,
    max_lines: int = 6,
    faults: Collection[tuple[int, Task]] = (),
) -> str:
    """Draws one row for every rank: its tasks in their order.

    Ranks with equal tasks share a row. A cell is the kind of the task and its microbatches; a
    prefix tells the module, and the language model has none. Where ranks have several stages of
    a module the stage follows.

    Args:
        schedule: The schedule.
        ranks: Ranks to draw; all by default.
        width: Columns of the terminal.
        max_lines: Lines of one row, at least 3; a longer one loses what is neither its beginning
            nor its end nor around a fault.
        faults: Ranks and tasks to put in brackets.

    Returns:
        Lines without a final newline; the first explains the prefixes.
    """
    rows = _fold(schedule, range(len(schedule.tasks)) if ranks is None else ranks)
    prefixes = _prefixes({task.module for tasks in rows for task in tasks})
    where = [_where(members, width=width // 3) for members in rows.values()]
    stages = [_stages(tasks) for tasks in rows]
    lead_widths = max(map(len, where), default=0), max(map(len, stages), default=0)
    lines = [_legend(schedule, prefixes)]
    for (tasks, members), *labels in zip(rows.items(), where, stages, strict=True):
        lead = "".join(f"{label:{size}}  " for label, size in zip(labels, lead_widths, strict=True))
        cells = [
            f"[{cell}]" if any((rank, task) in faults for rank in members) else cell
            for task, cell in zip(tasks, _cells(tasks, prefixes), strict=True)
        ]
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
    modules = list(dict.fromkeys(task.module for task in tasks))
    hosted = {(modules.index(task.module), task.stage) for task in tasks}
    stages = ((modules[module], stage) for module, stage in sorted(hosted))
    return " ".join(show_stages(stages)) or "idle"


def _cells(tasks: tuple[Task, ...], prefixes: Mapping[str, str]) -> list[str]:
    several = Counter(module for module, _ in {task[1:3] for task in tasks})
    return [
        prefixes[task.module]
        + str(task).split(" ", maxsplit=1)[0]
        + (f".{task.stage}" if several[task.module] > 1 else "")
        for task in tasks
    ]


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
        lines = _shorten(lead, lines, num_cells=len(cells), max_lines=max_lines)
    return lines


def _shorten(lead: str, lines: list[str], *, num_cells: int, max_lines: int) -> list[str]:
    """Keeps the beginning and the end of a row, or instead the lines up to its first fault."""
    first_fault = next((n for n, line in enumerate(lines) if "[" in line[len(lead) :]), 0)
    shown = lines[: max_lines - 2]
    if first_fault >= max_lines - 2:
        shown = [lines[0], *lines[first_fault - max_lines + 4 : first_fault + 1]]
    shown.append(lines[-1])
    num_shown = sum(len(line[len(lead) :].split()) for line in shown)
    gap = f"{' ' * len(lead)}... {num_cells - num_shown} tasks ..."
    return (
        [*shown[:-1], gap, shown[-1]]
        if first_fault < max_lines - 2
        else [shown[0], gap, *shown[1:]]
    )
