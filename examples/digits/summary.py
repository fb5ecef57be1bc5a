"""The demo's table: what every run did, side by side."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from examples.digits.runs import GLOBAL_BATCH_SIZE, LANGUAGE_TOKENS_PER_SAMPLE, NUM_STEPS, Outcome
from examples.digits.verdict import COMPARED_STEPS, LARGEST_DIFFERENCE, largest_difference

SHOWN_STEPS = (1, 10, 25, 50, 100, NUM_STEPS)


def summary(outcomes: Mapping[str, Outcome]) -> Table:
    """Makes the table.

    Args:
        outcomes: The runs by their titles; the others are compared with the first.
    """
    table = Table(title="Same script, same data, same start; three layouts", title_style="bold")
    table.add_column("", no_wrap=True)
    for title in outcomes:
        table.add_column(title, justify="right")
    for label, *cells in (*_losses(outcomes), *_differences(outcomes), *_speed(outcomes)):
        table.add_row(label, *cells)
    return table


def _losses(outcomes: Mapping[str, Outcome]) -> list[Sequence[str]]:
    return [
        (f"loss at step {step}", *(f"{o.log.losses[step - 1]:.7g}" for o in outcomes.values()))
        for step in SHOWN_STEPS
    ]


def _differences(outcomes: Mapping[str, Outcome]) -> list[Sequence[str]]:
    first, *others = (outcome.log for outcome in outcomes.values())
    return [
        (
            f"largest difference, steps 1-{COMPARED_STEPS}",
            "reference",
            *(f"{largest_difference(log, first):.1e}" for log in others),
        ),
        (
            "  of the first loss; allowed",
            "",
            *(f"{LARGEST_DIFFERENCE:.0e}" for _ in others),
        ),
        ("held-out accuracy", *(f"{log.accuracy:.2%}" for log in (first, *others))),
    ]


def _speed(outcomes: Mapping[str, Outcome]) -> list[Sequence[str]]:
    tokens = GLOBAL_BATCH_SIZE * LANGUAGE_TOKENS_PER_SAMPLE
    return [
        ("seconds per step", *(f"{o.log.step_s:.3f}" for o in outcomes.values())),
        ("language tokens/s", *(f"{tokens / o.log.step_s:,.0f}" for o in outcomes.values())),
        ("whole run, seconds", *(f"{o.total_s:.0f}" for o in outcomes.values())),
    ]
