"""Items of a microbatch that are dealt to the replicas of an encoder in any order."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_mosaic.layout.item_costs import Owners
from megatron_mosaic.layout.rows import Interval, Rows


@dataclass(frozen=True, kw_only=True, slots=True)
class DealtItems:
    """Who makes which rows of a microbatch, item by item.

    Args:
        owners: Replica of every item of each sample.
        sizes: Rows of every item of each sample, where its items are unlike; else None.
        rows: Rows of every replica that has an item.
        samples: Samples that these are of.
    """

    owners: Owners
    sizes: tuple[tuple[int, ...] | None, ...]
    rows: Mapping[int, Rows] = field(compare=False)
    samples: Mapping[int, Rows] = field(compare=False)

    @classmethod
    def of(cls, owners: Owners, runs: Sequence[Sequence[Interval]]) -> "DealtItems":
        """Finds the rows of every replica.

        Args:
            owners: Replica of every item of each sample.
            runs: Where the rows of each sample belong. As many runs as items are the items;
                else these have equally many rows.
        """
        sizes = tuple(_unlike(dps, of) for dps, of in zip(owners, runs, strict=True))
        rows: defaultdict[int, list[Interval]] = defaultdict(list)
        samples: defaultdict[int, list[Interval]] = defaultdict(list)
        first = 0
        for sample, replicas in enumerate(owners):
            if not replicas:
                continue
            own = sizes[sample] or _equal(len(replicas), runs[sample])
            for dp, size in zip(replicas, own, strict=True):
                rows[dp].append(Interval(first, first + size))
                first += size
            for dp in set(replicas):
                samples[dp].append(Interval(sample, sample + 1))
        return cls(
            owners=owners,
            sizes=sizes,
            rows={dp: Rows.of_sorted(intervals) for dp, intervals in rows.items()},
            samples={dp: Rows.of_sorted(intervals) for dp, intervals in samples.items()},
        )

    def replicas(self, samples: Interval) -> list[int]:
        """Replicas that run an item of some samples, each once, in order."""
        return sorted({dp for owners in self.owners[slice(*samples)] for dp in owners})

    def num_items(self, dp: int) -> int:
        """Items of the microbatch that a replica runs."""
        return sum(owners.count(dp) for owners in self.owners)


def _unlike(replicas: Sequence[int], runs: Sequence[Interval]) -> tuple[int, ...] | None:
    own = tuple(stop - start for start, stop in runs if stop > start)
    return own if len(own) == len(replicas) and len(set(own)) > 1 else None


def _equal(num_items: int, runs: Sequence[Interval]) -> tuple[int, ...]:
    return (sum(stop - start for start, stop in runs) // num_items,) * num_items
