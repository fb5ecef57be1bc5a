"""The order of a schedule's tasks as text, short enough for people to read and to change.

A list of tasks is one line for each kind of ranks: ``F`` and ``B`` are passes of the language
model, ``vision:F`` is one of an encoder, ``F@2`` one of stage 2 where ranks host several stages of
a module. Each stage takes its microbatches, or groups of them, in ascending order, so they need
no numbers. ``(F B)*7`` repeats what stands in the parentheses, and ``F*4`` one task.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from megatron_mosaic.errors import PlanError
from megatron_mosaic.fields import nearest, show
from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.layout.ranks import show_ranks
from megatron_mosaic.schedule.colocated import encoder_groups, encoder_stages
from megatron_mosaic.schedule.graph import RankKind, Stage, ahead_modules, rank_kinds, stage_order
from megatron_mosaic.schedule.schedule import Schedule
from megatron_mosaic.schedule.task import Task
from megatron_mosaic.schedule.task_arrays import TaskArrays

_ITEM = re.compile(r"\(([^()]*)\)(?:\*([0-9]+))?|([^()*\s]+)(?:\*([0-9]+))?|(\S+)")
_LONGEST_REPEATED = 12
_MOST_TASKS = 1_000_000  # of one list; more are a slip of the pen that would fill the memory

Order = tuple[tuple[str, str], ...]


def write_order(plan: Plan, schedule: Schedule) -> Order:
    """Writes the tasks of every kind of ranks, in the order of their first ranks."""
    return tuple(
        (show_ranks(kind.ranks), _write(kind, schedule.tasks[kind.ranks[0]]))
        for kind in rank_kinds(plan)
    )


def read_order(plan: Plan) -> Schedule:
    """Reads the schedule that a plan holds.

    Raises:
        PlanError: The order is not of the form, or names other ranks or tasks than the plan has.
    """
    stages = stage_order(plan)
    tasks: list[tuple[Task, ...]] = [()] * plan.world_size
    for kind, arrays in zip(rank_kinds(plan), read_lists(plan), strict=True):
        own = tuple(arrays.tasks(stages))
        for rank in kind.ranks:
            tasks[rank] = own
    return Schedule(
        num_microbatches=plan.num_microbatches,
        forward_only=False,
        tasks=tuple(tasks),
        ahead=ahead_modules(plan),
        receives_early=True,
    )


def read_lists(plan: Plan) -> tuple[TaskArrays, ...]:
    """Reads the tasks of every kind of ranks that a plan holds.

    Returns:
        Tasks whose ``stage`` counts the plan's ``stage_order``.

    Raises:
        PlanError: The order is not of the form, or names other ranks or tasks than the plan has.
    """
    written = dict(plan.schedule.order or ())
    kinds = {show_ranks(kind.ranks): kind for kind in rank_kinds(plan)}
    _check_ranks(written, kinds)
    return tuple(
        _read(plan, kind, f"schedule: order[{ranks}]", written[ranks])
        for ranks, kind in kinds.items()
    )


def _check_ranks(written: Mapping[str, str], kinds: Mapping[str, RankKind]) -> None:
    for ranks in kinds:
        if ranks not in written:
            raise PlanError(
                f"schedule: order={show(list(written))} must name the ranks {ranks}, which host "
                f"the same stages; add their tasks"
            )
    for ranks in written:
        if ranks not in kinds:
            advice = nearest(ranks, kinds, otherwise="remove it")
            raise PlanError(
                f"schedule: order key={show(ranks)} must be one of {', '.join(kinds)}; {advice}"
            )


def _write(kind: RankKind, tasks: Sequence[Task]) -> str:
    names = {stage: name for name, stage in _names(kind).items()}
    symbols = [_symbol(task.kind, names[Stage(task.module, task.stage)]) for task in tasks]
    parts = []
    for block, times in _runs(symbols):
        text = block[0] if len(block) == 1 else f"({' '.join(block)})"
        parts.append(text if times == 1 else f"{text}*{times}")
    return " ".join(parts)


def _names(kind: RankKind) -> dict[tuple[str, str], Stage]:
    """Stages of a kind of ranks by what stands before and after the pass."""
    num_stages = Counter(stage.module for stage in kind.stages)
    return {
        (
            "" if stage.module == LANGUAGE else f"{stage.module}:",
            f"@{stage.stage}" if num_stages[stage.module] > 1 else "",
        ): stage
        for stage in kind.stages
    }


def _symbol(kind: str, name: tuple[str, str]) -> str:
    before, after = name
    return f"{before}{kind}{after}"


def _runs(symbols: list[str]) -> Iterator[tuple[list[str], int]]:
    """Cuts symbols into blocks and how often they stand there, the longest repetition first."""
    start = 0
    while start < len(symbols):
        best = 1, 1
        for length in range(1, _LONGEST_REPEATED + 1):
            block = symbols[start : start + length]
            times = 1
            while symbols[start + times * length : start + (times + 1) * length] == block:
                times += 1
            # A repetition must save more than the parentheses cost.
            if times > 1 and times * length > best[0] * best[1]:
                best = length, times
        length, times = best
        yield symbols[start : start + length], times
        start += length * times


def _read(plan: Plan, kind: RankKind, where: str, text: str) -> TaskArrays:
    passes: dict[str, tuple[bool, Stage]] = {}
    for name, stage in _names(kind).items():
        passes |= {_symbol("F", name): (False, stage), _symbol("B", name): (True, stage)}
    codes = {symbol: code for code, symbol in enumerate(passes)}
    written = list(_expand(where, text))
    unknown = next((symbol for symbol in written if symbol not in codes), None)
    if unknown is not None:
        advice = nearest(unknown, passes, otherwise="write one of them")
        raise PlanError(
            f"{where}: task={show(unknown)} must be one of {', '.join(passes)}; {advice}"
        )
    code = np.array([codes[symbol] for symbol in written], dtype=np.int64)
    tasks = TaskArrays(*np.zeros((4, len(code)), dtype=np.int64))
    encoders, number = encoder_stages(plan), stage_order(plan).index
    groups = encoder_groups(plan, num_microbatches=plan.num_microbatches)
    single = [(m,) for m in range(plan.num_microbatches)]
    for symbol, (backward, stage) in passes.items():
        own = np.flatnonzero(code == codes[symbol])
        microbatches = groups if stage in encoders else single
        if len(own) > len(microbatches):
            raise PlanError(
                f"{where}: task={symbol} must stand there {len(microbatches)} times, not more; "
                f"remove the others"
            )
        tasks.stage[own], tasks.backward[own] = number(stage), backward
        tasks.first[own] = [group[0] for group in microbatches[: len(own)]]
        tasks.count[own] = [len(group) for group in microbatches[: len(own)]]
    return tasks


def _expand(where: str, text: str) -> Iterator[str]:
    """Yields the symbols of a list with its repetitions written out."""
    num_symbols = 0
    for match in _ITEM.finditer(text):
        block, times_of_block, symbol, times_of_symbol, rest = match.groups()
        symbols = symbol.split() if block is None and symbol else (block or "").split()
        times = int(times_of_block or times_of_symbol or 1)
        if rest is not None or not symbols or not times:
            raise PlanError(
                f"{where}: item={show(match[0])} must be a task or tasks in parentheses, repeated "
                f"once or more; write for example F*4 or (F B)*4"
            )
        num_symbols += times * len(symbols)
        if num_symbols > _MOST_TASKS:
            raise PlanError(
                f"{where}: item={show(match[0])} must lead to <= {_MOST_TASKS} tasks; "
                f"mend the number"
            )
        for _ in range(times):
            yield from symbols
