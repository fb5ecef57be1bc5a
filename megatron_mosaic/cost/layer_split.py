"""Deals the layers of a module, runs of equal ones, to its pipeline stages."""

from collections.abc import Iterable, Sequence


def even_split(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Layers of each stage, as equal as they can be; the first stages have more."""
    each, more = divmod(num_layers, num_stages)
    return tuple(each + (stage < more) for stage in range(num_stages))


def split_runs[Layer](
    runs: Iterable[tuple[int, Layer]], layers_per_stage: Sequence[int]
) -> list[tuple[tuple[int, Layer], ...]]:
    """Cuts runs of equal layers where stages end.

    Args:
        runs: How many layers are alike, and what they are; in the order of the module.
        layers_per_stage: Layers of each stage, as many in all as the runs have.
    """
    waiting = [run for run in runs if run[0]]
    stages = []
    for number in layers_per_stage:
        stage = []
        while number:
            count, layer = waiting[0]
            taken = min(count, number)
            stage.append((taken, layer))
            number -= taken
            waiting[:1] = [(count - taken, layer)] if taken < count else []
        stages.append(tuple(stage))
    return stages
