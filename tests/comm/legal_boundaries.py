"""Random boundaries between modules in any layout, and what is at them without any layout.

Everything is drawn with the ranks of one world in mind: modules may share all ranks, some or none,
in any order.
"""

from dataclasses import dataclass, field, replace
from itertools import product
from math import prod

import hypothesis
import numpy as np
from hypothesis import strategies as st

from megatron_mosaic.comm.boundary import (
    BoundaryRoutes,
    BoundaryShape,
    ItemShape,
    Samples,
    TaskOwners,
)
from megatron_mosaic.layout.attention import AttentionPlan
from megatron_mosaic.layout.ownership import count_rows
from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.rows import Interval, split_evenly
from megatron_mosaic.layout.sequences import MaskedSharding, SampleSequence
from megatron_mosaic.layout.sharding import SequenceSharding

HIDDEN = 3
LAST_LENGTH = 48  # positions that the last of three modules has


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """Two modules, and the samples of one step."""

    source: ModulePlacement
    destination: ModulePlacement
    shape: BoundaryShape
    samples: Samples
    groups: tuple[tuple[int, ...], ...]  # microbatches of the source's tasks
    owners: TaskOwners = field(default_factory=dict)  # where the source's items are dealt
    sequences: tuple[SampleSequence, ...] = ()  # of every sample, where their masks split them

    @property
    def num_samples(self) -> int:
        """Samples of a microbatch."""
        return self.shape.samples_per_replica * self.destination.data_parallel_size

    @property
    def microbatches(self) -> range:
        """Microbatches of the step."""
        return range(len(self.samples) // self.num_samples)

    def counts(self) -> list[int]:
        """Rows of every sample of the step."""
        return [count_rows(runs) for runs in self.samples]

    def routes(self) -> BoundaryRoutes:
        """The routes of the step."""
        routes = BoundaryRoutes(self.source, self.destination, shape=self.shape)
        routes.begin(self.samples, groups=self.groups, owners=self.owners, sequences=self.sequences)
        return routes

    def made_by(self, rank: int) -> list[list[int]]:
        """Rows of the step that a rank makes in each microbatch, row by row from the sizes."""
        numbers: list[list[int]] = [[] for _ in self.microbatches]
        source = self.source
        if rank not in source.stage_ranks(source.pipeline_model_parallel_size - 1):
            return numbers
        position, row = source.coordinates(rank), 0
        for group in self.groups:
            size = len(group) * self.num_samples
            for place in range(size):
                sample = group[0] * self.num_samples + place
                in_order = max(
                    dp
                    for dp in range(source.data_parallel_size)
                    if dp * size // source.data_parallel_size <= place
                )
                for number in range(count_rows(self.samples[sample])):
                    dp = in_order
                    if self.owners:
                        dp = self.owners[group][place][number // self.shape.item.rows]
                    if dp == position.dp and self._has_item_row(number, position.cp):
                        numbers[sample // self.num_samples].append(row)
                    row += 1
        return numbers

    def kept_by(self, rank: int) -> list[list[int]]:
        """Rows of the step that a rank keeps of each microbatch, row by row from the sizes."""
        numbers: list[list[int]] = [[] for _ in self.microbatches]
        if rank not in self.destination.stage_ranks(0):
            return numbers
        position, row = self.destination.coordinates(rank), 0
        for sample, runs in enumerate(self.samples):
            dp = sample % self.num_samples // self.shape.samples_per_replica
            for place in (place for run in runs for place in range(*run)):
                if dp == position.dp and self._has_place(sample, place, position.cp, position.tp):
                    numbers[sample // self.num_samples].append(row)
                row += 1
        return numbers

    def inputs(self) -> np.ndarray:
        """What stands in for the rows of the step ``[rows, h]``; no two are alike."""
        return np.random.default_rng(1).normal(size=(sum(self.counts()), HIDDEN))

    def row_gradients(self) -> np.ndarray:
        """Gradients that the rows would have in one process; zero where nobody keeps them.

        The loss is the sum of the squares of the rows, each times its number.
        """
        rows = self.inputs()
        wanted = np.zeros(len(rows))
        for rank in self.destination.stage_ranks(0):
            wanted[[row for numbers in self.kept_by(rank) for row in numbers]] = 1
        return 2 * rows * (wanted * np.arange(1, len(rows) + 1))[:, None]

    def own_part(self, rank: int, rows: list[int]) -> np.ndarray:
        """Of which of its rows a rank of the destination has the gradient, ``[rows, 1]``.

        Where context-parallel ranks keep whole sequences each has it of every cp-th row.
        """
        cp = self.destination.context_parallel_size
        if self.shape.sharding is not None or cp == 1:
            return np.ones((len(rows), 1))
        own = np.array(rows, dtype=int) % cp == self.destination.coordinates(rank).cp
        return own[:, None].astype(float)

    def _has_item_row(self, number: int, cp: int) -> bool:
        shards = self.shape.item.shards
        return shards is None or number % self.shape.item.rows in range(*shards[cp])

    def _has_place(self, sample: int, place: int, cp: int, tp: int) -> bool:
        sharding = self.shape.sharding
        if sharding is None:
            return True
        if place >= sharding.sequence_length:
            return False
        if isinstance(sharding, MaskedSharding):
            return self._has_slot(sharding, sample, place, cp, tp)
        local = np.arange(sharding.sequence_length)
        if sharding.cp > 1:
            local = np.split(local, 2 * sharding.cp)
            local = np.concatenate([local[cp], local[-1 - cp]])
        part = np.split(local, sharding.tp)[tp if sharding.tp > 1 else 0]
        return place in part

    def _has_slot(
        self, sharding: MaskedSharding, sample: int, place: int, cp: int, tp: int
    ) -> bool:
        """Whether a rank has a position, token by token from who has which of the sequence."""
        size = self.shape.samples_per_replica
        first = sample // size * size
        owners = [rank_of_tokens(sharding, each) for each in self.sequences[first : first + size]]
        most = max(np.bincount(each, minlength=sharding.cp).max() for each in owners)
        slots_of_part = -(-int(most) // sharding.tp)
        own = owners[sample - first]
        slot = np.count_nonzero(own[:place] == cp)
        return own[place] == cp and (sharding.tp == 1 or slot // slots_of_part == tp)


def rank_of_tokens(sharding: MaskedSharding, sequence: SampleSequence) -> np.ndarray:
    """Context-parallel rank of every token of a sequence ``[length]``."""
    assignment = sharding.assignment(sequence)
    return np.repeat(assignment.owner, assignment.cut.sizes)


@st.composite
def placements(draw, name, world_size, *, with_context=True):
    shape = draw(st.sampled_from(_shapes(world_size, with_context=with_context)))
    num_ranks = prod(shape)
    if draw(st.booleans()):  # in a row, from anywhere
        first = draw(st.integers(0, world_size - num_ranks))
        ranks = list(range(first, world_size))
    else:
        ranks = draw(st.permutations(range(world_size)))
    tp, cp, dp, pp = shape
    return ModulePlacement(
        name=name,
        ranks=tuple(ranks[:num_ranks]),
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        data_parallel_size=dp,
        pipeline_model_parallel_size=pp,
        sequence_parallel=tp > 1 and name != "vision" and draw(st.booleans()),
    )


def _shapes(world_size, *, with_context):
    """Sizes (tp, cp, dp, pp) for which a world has the ranks."""
    shapes = product([1, 2, 3, 4], [1, 2] if with_context else [1], range(1, 7), [1, 2])
    return [shape for shape in shapes if prod(shape) <= world_size]


@st.composite
def boundaries(draw, max_world_size=8, world_size=None, source=None, destination=None):
    world_size = world_size or draw(st.sampled_from(_worlds(max_world_size)))
    source = source or draw(placements("vision", world_size))
    destination = destination or draw(placements("language", world_size))
    size, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    num_groups = draw(st.integers(1, 2))
    num_samples = size * destination.data_parallel_size * group * num_groups
    item = _item(draw, source)
    length, sharding = _length(draw, destination)
    with_masks = sharding is not None and draw(st.booleans())
    if with_masks:
        length, sharding = _masked(draw, destination)
    samples = tuple(_runs(draw, item.rows, length) for _ in range(num_samples))
    groups = tuple(tuple(range(index * group, (index + 1) * group)) for index in range(num_groups))
    return Boundary(
        source=source,
        destination=destination,
        shape=BoundaryShape(samples_per_replica=size, sharding=sharding, item=item),
        samples=samples,
        groups=groups,
        owners=_owners(draw, groups, samples, dp=source.data_parallel_size),
        sequences=tuple(_sequence(draw, runs, length) for runs in samples) if with_masks else (),
    )


def _owners(draw, groups, samples, *, dp):
    """In half of the boundaries any replica runs any item; the runs of a sample are its items."""
    if draw(st.booleans()):
        return {}
    seed = draw(st.integers(0, 99))
    size = len(samples) // sum(map(len, groups))
    owners = {}
    for group in groups:
        own = samples[group[0] * size : (group[-1] + 1) * size]
        numbers = np.random.default_rng((seed, group[0])).integers(dp, size=(len(own), 3)).tolist()
        owners[group] = tuple(
            tuple(row[: len(runs)]) for row, runs in zip(numbers, own, strict=True)
        )
    return owners


def _item(draw, source):
    rows = draw(st.integers(1, 4))
    cp = source.context_parallel_size
    return ItemShape(rows=rows, shards=split_evenly(rows, cp) if cp > 1 else None)


def _length(draw, destination):
    cp, tp = destination.context_parallel_size, destination.tensor_model_parallel_size
    multiple = 2 * cp * tp
    length = multiple * draw(st.integers(1, max(1, 12 // multiple)))
    if cp > 1 and not destination.sequence_parallel and draw(st.integers(0, 3)) == 0:
        return length, None  # whole sequences everywhere: each rank has a part of the gradient
    return length, SequenceSharding.of(destination, sequence_length=length)


def _masked(draw, destination):
    """A split by masks, of any length."""
    cp = destination.context_parallel_size
    attention = AttentionPlan(
        mask=draw(st.sampled_from(["causal", "prefix_lm", "multimodal_packed"])),
        tokens=draw(st.sampled_from(["contiguous", "zigzag", "lpt", "balanced"])),
    )
    length = draw(st.integers(1, 150))
    tp = destination.tensor_model_parallel_size if destination.sequence_parallel else 1
    return length, MaskedSharding(attention=attention, sequence_length=length, cp=cp, tp=tp)


def _sequence(draw, runs, length):
    """What a batch says of a sample: padding after its last item, if there is room."""
    behind = max([1, *(run.stop for run in runs)])
    stop = draw(st.integers(min(behind, length), length))
    return SampleSequence(runs, draw(st.sampled_from([None, (stop,)])))


def _runs(draw, item_rows, length):
    """Positions of the items of a sample: any number, some beyond the end of the sequence."""
    runs, position = [], 0
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2, 3]))):
        position += draw(st.integers(0, max(0, length // 3)))
        runs.append(Interval(position, position + item_rows))
        position += item_rows
    return tuple(runs)


def _worlds(max_world_size):
    """Numbers of ranks, the larger ones more often: there more layouts are possible."""
    return [size for size in range(max_world_size, 0, -1) for _ in range(size)]


@st.composite
def pairs_of_boundaries(draw, max_world_size=8):
    """Two boundaries of three modules: two sources of one destination, or one after the other."""
    world_size = draw(st.sampled_from(_worlds(max_world_size)))
    if draw(st.booleans()):
        destination = draw(placements("language", world_size))
        return tuple(
            draw(boundaries(world_size=world_size, destination=destination)) for _ in range(2)
        )
    middle = draw(placements("language", world_size, with_context=False))
    first = draw(boundaries(world_size=world_size, destination=_whole(middle)))
    last = draw(placements("generator", world_size))
    if first.num_samples % last.data_parallel_size:
        last = _with_one_replica(last)
    # The middle makes a row of each that it keeps, one microbatch at a time.
    return first, Boundary(
        source=_whole(middle),
        destination=last,
        shape=BoundaryShape(
            samples_per_replica=first.num_samples // last.data_parallel_size,
            sharding=SequenceSharding.of(last, sequence_length=LAST_LENGTH),
        ),
        samples=first.samples,
        groups=tuple((microbatch,) for microbatch in first.microbatches),
    )


def _whole(placement):
    """The placement without sequence parallelism: ranks keep whole sequences."""
    return replace(placement, sequence_parallel=False)


def _with_one_replica(placement):
    num_ranks = len(placement.ranks) // placement.data_parallel_size
    return replace(placement, ranks=placement.ranks[:num_ranks], data_parallel_size=1)


def drawn(strategy, num_examples, *, seed):
    """The same examples of a strategy in every run."""
    examples = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=num_examples,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def collect(example):
        examples.append(example)

    collect()
    return examples
