"""Rank lists as people write them: ``3``, ``0-7``, ``[0, 2, 4-7]``."""

import re
from collections.abc import Iterable

from megatron_mosaic.errors import PlanError
from megatron_mosaic.fields import show

# A slip of the keyboard must not become a list of ranks that fills the memory.
MAX_WORLD_SIZE = 1_000_000

_SPAN = re.compile(r"([0-9]{1,6})-([0-9]{1,6})")

Span = int | str


def parse_ranks(field: str, written: object) -> tuple[int, ...]:
    """Reads a rank, a span, or a list of both, in the order written.

    Args:
        field: Name of the field in messages.
        written: What stands in the plan file.

    Raises:
        PlanError: It is none of the three, or a span runs backwards.
    """
    spans = written if isinstance(written, list) else [written]
    return tuple(rank for span in spans for rank in _parse_span(field, span))


def _parse_span(field: str, span: object) -> Iterable[int]:
    if isinstance(span, int) and not isinstance(span, bool):
        return (span,)
    match = _SPAN.fullmatch(span) if isinstance(span, str) else None
    if match is None:
        raise PlanError(
            f"{field}={show(span)} must be ranks: a number, a span or a list of both; "
            f"write for example 3, 0-7 or [0, 2, 4-7]"
        )
    first, last = int(match[1]), int(match[2])
    if first > last:
        raise PlanError(
            f"{field}={show(span)} must run from the lower rank to the higher; "
            f"write {last}-{first}, or a list for another order"
        )
    return range(first, last + 1)


def rank_spans(ranks: Iterable[int]) -> Span | list[Span]:
    """Shortest way to write ranks in their order; ``parse_ranks`` gives them back."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1 and rank > 0:  # no span starts below 0
            runs[-1].append(rank)
        else:
            runs.append([rank])
    spans: list[Span] = [run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return spans[0] if len(spans) == 1 else spans


def show_ranks(ranks: Iterable[int]) -> str:
    """Text of a rank list for tables and messages."""
    spans = rank_spans(ranks)
    return f"[{', '.join(map(str, spans))}]" if isinstance(spans, list) else str(spans)
