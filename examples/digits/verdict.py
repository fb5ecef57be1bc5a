"""What the demo promises, and whether the runs kept it."""

from collections.abc import Mapping, Sequence

from examples.digits.training_log import TrainingLog

LEAST_ACCURACY = 0.95
LARGEST_ACCURACY_GAP = 0.01
COMPARED_STEPS = 50
# Of the first step's loss: layouts add the same numbers in another order, in 32 bits.
LARGEST_DIFFERENCE = 1e-4


def relative_differences(log: TrainingLog, reference: TrainingLog) -> list[float]:
    """Distance of every step's loss from the reference's, as part of its first loss."""
    return [
        abs(ours - theirs) / reference.losses[0]
        for ours, theirs in zip(log.losses, reference.losses, strict=True)
    ]


def largest_difference(log: TrainingLog, reference: TrainingLog) -> float:
    """Largest of ``relative_differences`` over the compared steps."""
    return max(relative_differences(log, reference)[:COMPARED_STEPS])


def broken_promises(logs: Mapping[str, TrainingLog]) -> list[str]:
    """Says which promises were broken, one line each; none if all is well.

    Args:
        logs: Logs of the runs by their titles; all are compared with each other.
    """
    broken = [
        f"{title}: held-out accuracy={log.accuracy} must be >= {LEAST_ACCURACY}"
        for title, log in logs.items()
        if log.accuracy is None or log.accuracy < LEAST_ACCURACY
    ]
    titles = list(logs)
    for index, title in enumerate(titles):
        for other in titles[index + 1 :]:
            broken += _disagreements(title, logs[title], other, logs[other])
    return broken


def _disagreements(title: str, log: TrainingLog, other: str, theirs: TrainingLog) -> Sequence[str]:
    broken = []
    # A loss that is not a number breaks this promise too.
    if not (difference := largest_difference(theirs, log)) <= LARGEST_DIFFERENCE:
        broken.append(
            f"{title} and {other}: largest loss difference={difference:.1e} of the first loss "
            f"must be <= {LARGEST_DIFFERENCE} over {COMPARED_STEPS} steps"
        )
    gap = abs((log.accuracy or 0.0) - (theirs.accuracy or 0.0))
    if gap > LARGEST_ACCURACY_GAP:
        broken.append(
            f"{title} and {other}: accuracies differ by {gap:.3f}, which must be "
            f"<= {LARGEST_ACCURACY_GAP}"
        )
    return broken
