"""Splits layers into pipeline stages so that the slowest one is as fast as can be."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import inf
from typing import NamedTuple

from megatron_mosaic.cost.costs import ModuleCosts
from megatron_mosaic.cost.stages import backward_s


class Load(NamedTuple):
    """What one part of a module adds to the stage that has it.

    Args:
        time_s: Forward and backward pass of one task.
        fixed_bytes: Held all the time.
        live_bytes: Held for each task between its passes.
    """

    time_s: float
    fixed_bytes: float = 0.0
    live_bytes: float = 0.0


NOTHING = Load(0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """The parts of a module in the order of the data.

    Args:
        input: What the first stage has before its layers.
        layers: All layers.
        output: What the last stage has after its layers.
    """

    input: Load = NOTHING
    layers: tuple[Load, ...]
    output: Load = NOTHING


class Split(NamedTuple):
    """Layers of each stage, and the time of the slowest stage."""

    layers_per_stage: tuple[int, ...]
    slowest_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """Memory of a stage.

    Args:
        num_bytes: What a rank has for the module.
        live_tasks: Tasks between their passes, for each stage, first stage first; never more in
            a later stage than in an earlier one.
    """

    num_bytes: float
    live_tasks: Sequence[float]


def chain_of(
    costs: ModuleCosts, *, trainable_upstream: bool, frozen_aware: bool = True
) -> tuple[tuple[float, ...], float, float]:
    """Times of the parts of a module: of every layer, of its input, and of its output.

    Args:
        costs: The module under its sizes.
        trainable_upstream: Whether a module that feeds it has something that trains.
        frozen_aware: Whether a backward pass does only what somebody needs; otherwise it counts
            as twice the forward pass everywhere, plus what is computed again.
    """
    parts = [costs.input, *costs.each_layer(), costs.output]
    times, upstream = [], trainable_upstream
    for part in parts:
        times.append(
            part.forward_s + backward_s(part, upstream=upstream)
            if frozen_aware
            else 3 * part.forward_s + part.recompute_s
        )
        upstream = upstream or part.trainable > 0
    return tuple(times[1:-1]), times[0], times[-1]


def split_layers(chain: Chain, *, num_stages: int, room: Room | None = None) -> Split | None:
    """Splits a module into stages of at least one layer, the slowest as fast as can be.

    For a bound on the stages' time, the furthest layer that ``n`` stages can reach follows from
    the furthest that ``n - 1`` reach: a stage that begins later with the same end is never
    slower, nor larger. The bound rises from the even share and falls with the splits that are
    found; a bound that fails rises at once to the next one that changes anything, so the search
    ends at the optimum itself. An even split is preferred among equally fast ones.

    Args:
        chain: The parts of the module.
        num_stages: Stages, at most as many as layers.
        room: Memory; ``None`` is as much as anybody wants.

    Returns:
        The split, or None if no split fits the memory.
    """
    search = _Search(chain, num_stages=num_stages, room=room)
    best = _fastest(search)
    return best and (search.even(best.slowest_s) or best)


def _fastest(search: "_Search") -> Split | None:
    best, low = search.probe(inf)
    if best is None:
        return None
    low, try_low = search.lower_bound_s(), True
    while low < best.slowest_s:
        bound = low if try_low else (low + best.slowest_s) / 2
        found, larger = search.probe(bound)
        if found is None:
            low = larger
        elif bound == low:
            return found
        else:
            best = found
        try_low = not try_low
    return best


def split_chains(
    chains: Sequence[Chain], *, num_stages: int, memory_bytes: float = inf, num_microbatches: int
) -> tuple[Split, ...] | None:
    """Splits modules that follow each other into one pipeline, whose slowest stage is fastest.

    No stage has layers of two modules. All ways to give stages to modules are taken into account:
    more stages never make a module's slowest stage slower, so the best bottleneck of a prefix of
    the modules follows from that of a shorter prefix.

    Args:
        chains: The modules in the order of the data.
        num_stages: Stages of all modules together.
        memory_bytes: Memory of a rank.
        num_microbatches: Microbatches of a step, at most as many as which are live in a stage.

    Returns:
        The split of every module, or None if nothing fits.
    """
    best: dict[int, tuple[Split, ...]] = {0: ()}
    behind = [sum(len(chain.layers) for chain in chains[i + 1 :]) for i in range(len(chains))]
    for index, chain in enumerate(chains):
        longer: dict[int, tuple[Split, ...]] = {}
        for used, splits in best.items():
            most = min(len(chain.layers), num_stages - used - (len(chains) - index - 1))
            for stages in range(max(1, num_stages - used - behind[index]), most + 1):
                first_live = num_stages - used
                live = [min(num_microbatches, first_live - s) for s in range(stages)]
                room = Room(num_bytes=memory_bytes, live_tasks=live)
                split = split_layers(chain, num_stages=stages, room=room)
                if split is None:
                    continue
                option = (*splits, split)
                known = longer.get(used + stages)
                if known is None or _slowest(option) < _slowest(known):
                    longer[used + stages] = option
        best = longer
    return best.get(num_stages)


def _slowest(splits: Sequence[Split]) -> float:
    return max(split.slowest_s for split in splits)


class _Search:
    """Sums over the layers of a chain, and the greedy split for a bound on time."""

    def __init__(self, chain: Chain, *, num_stages: int, room: Room | None) -> None:
        self.chain, self.num_stages, self.room = chain, num_stages, room
        self.times = list(accumulate((load.time_s for load in chain.layers), initial=0.0))
        self.fixed = list(accumulate((load.fixed_bytes for load in chain.layers), initial=0.0))
        self.live = list(accumulate((load.live_bytes for load in chain.layers), initial=0.0))

    def lower_bound_s(self) -> float:
        """Time below which no split can be: the even share, or what no split takes apart."""
        num_layers, last = len(self.chain.layers), self.num_stages - 1
        if last == 0:
            return self._time_s(0, 0, num_layers)
        total_s = self.chain.input.time_s + self.times[-1] + self.chain.output.time_s
        ends_s = max(self._time_s(0, 0, 1), self._time_s(last, num_layers - 1, num_layers))
        longest_s = max(stop - start for start, stop in pairwise(self.times))
        # The sums of the stages may come out smaller than the total by their rounding.
        return max(total_s / self.num_stages * (1 - 1e-12), longest_s, ends_s)

    def probe(self, bound_s: float) -> tuple[Split | None, float]:
        """Returns a split whose stages take ``bound_s`` at most, if there is one.

        Without one, the second value is the smallest bound under which a stage reaches further
        than under this one.
        """
        num_layers, num_stages = len(self.chain.layers), self.num_stages
        ends, larger = [0], inf
        for stage in range(num_stages):
            stop = self._furthest(ends[-1], stage, bound_s)
            further = num_layers if stage == num_stages - 1 else min(stop + 1, num_layers)
            time_s = self._time_s(stage, ends[-1], further)
            if time_s > bound_s:
                larger = min(larger, time_s)
            ends.append(stop)
        if ends[-1] < num_layers:
            return None, larger
        # Every stage has a layer: those that were left without take one from the stage before.
        for stage in range(num_stages - 1, 0, -1):
            ends[stage] = min(ends[stage], ends[stage + 1] - 1)
        stages = [(stage, ends[stage], ends[stage + 1]) for stage in range(num_stages)]
        if ends[1] < 1 or not all(self._fits(*stage, bound_s) for stage in stages):
            return None, larger
        slowest_s = max(self._time_s(*stage) for stage in stages)
        return Split(tuple(stop - start for _, start, stop in stages), slowest_s), bound_s

    def even(self, bound_s: float) -> Split | None:
        """Returns an even split, the middle stages having more, if it keeps the bound."""
        each, more = divmod(len(self.chain.layers), self.num_stages)
        first = (self.num_stages - more + 1) // 2
        counts = [each + (first <= stage < first + more) for stage in range(self.num_stages)]
        ends = [*accumulate(counts, initial=0)]
        stages = [(stage, ends[stage], ends[stage + 1]) for stage in range(self.num_stages)]
        if not all(self._fits(*stage, bound_s) for stage in stages):
            return None
        return Split(tuple(counts), max(self._time_s(*stage) for stage in stages))

    def _furthest(self, start: int, stage: int, bound_s: float) -> int:
        """Layer before which the stage must end; ``start`` if it can have none."""
        last = stage == self.num_stages - 1
        # Sums end a little beyond the bound where floating point rounds, so the end is a guess.
        target = bound_s + self.times[start] - (self.chain.input.time_s if stage == 0 else 0.0)
        stop = min(bisect_right(self.times, target), len(self.chain.layers))
        if last and stop < len(self.chain.layers):
            return start
        if self.room is not None and stop > start and not self._has_room(stage, start, stop):
            low, high = start, stop  # the stage has room for layers up to low, not up to high
            while high - low > 1:
                middle = (low + high) // 2
                if self._has_room(stage, start, middle):
                    low = middle
                else:
                    high = middle
            stop = low
        while stop > start and self._time_s(stage, start, stop) > bound_s:
            stop -= 1
        return max(stop, start)

    def _fits(self, stage: int, start: int, stop: int, bound_s: float) -> bool:
        return self._time_s(stage, start, stop) <= bound_s and self._has_room(stage, start, stop)

    def _time_s(self, stage: int, start: int, stop: int) -> float:
        time_s = self.times[stop] - self.times[start]
        if stage == 0:
            time_s += self.chain.input.time_s
        if stage == self.num_stages - 1:
            time_s += self.chain.output.time_s
        return time_s

    def _has_room(self, stage: int, start: int, stop: int) -> bool:
        if self.room is None:
            return True
        fixed = self.fixed[stop] - self.fixed[start]
        live = self.live[stop] - self.live[start]
        ends = []
        if stage == 0:
            ends.append(self.chain.input)
        if stage == self.num_stages - 1:
            ends.append(self.chain.output)
        fixed += sum(load.fixed_bytes for load in ends)
        live += sum(load.live_bytes for load in ends)
        return fixed + self.room.live_tasks[stage] * live <= self.room.num_bytes
