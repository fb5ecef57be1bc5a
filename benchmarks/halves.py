"""Which published cases constants are fitted to, and which they are only checked against."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from benchmarks.published_points import Case, Point, Source, cases_of, newest

FITTED: tuple[Source, ...] = (
    "simumax", "a100-2205.05198", "bridge-dense", "bridge-moe", "recipes", "cards", "nemo-cp",
)  # fmt: skip
"""Sources whose first half is fitted; the others are only checked."""


def fitted_cases(points: Iterable[Point]) -> list[Case]:
    """The newest measurement of every layout of the fitted sources."""
    cases, _ = cases_of(points)
    return newest(case for case in cases if case.step_s and case.source in FITTED)


def halves(cases: Sequence[Case]) -> tuple[list[Case], list[Case]]:
    """Deals cases to halves A and B: in turn, by source and GPU, in the order of the file."""
    groups: dict[tuple[str, str], list[Case]] = defaultdict(list)
    for case in sorted(cases, key=lambda case: case.point.line):
        groups[case.source, case.gpu].append(case)
    first = [case for group in groups.values() for case in group[::2]]
    second = [case for group in groups.values() for case in group[1::2]]
    return first, second
