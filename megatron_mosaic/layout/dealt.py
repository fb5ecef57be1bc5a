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
        owners: Replica of every item of each sample; the items of a sample have equally many rows.
        rows: Rows of every replica that has an item.
        samples: Samples that these are of.
    """

    owners: Owners
    rows: Mapping[int, Rows] = field(compare=False)
    samples: Mapping[int, Rows] = field(compare=False)

    @classmethod
    def of(cls, owners: Owners, *, offsets: Sequence[int]) -> "DealtItems":
        """Finds the rows of every replica.

        Args:
            owners: Replica of every item of each sample.
            offsets: First row of each sample, and their number as last entry.
        """
        rows: defaultdict[int, list[Interval]] = defaultdict(list)
        samples: defaultdict[int, list[Interval]] = defaultdict(list)
        for sample, replicas in enumerate(owners):
            if not replicas:
                continue
            first = offsets[sample]
            size = (offsets[sample + 1] - first) // len(replicas)
            for dp in replicas:
                rows[dp].append(Interval(first, first + size))
                first += size
            for dp in set(replicas):
                samples[dp].append(Interval(sample, sample + 1))
        return cls(
            owners=owners,
            rows={dp: Rows.of_sorted(intervals) for dp, intervals in rows.items()},
            samples={dp: Rows.of_sorted(intervals) for dp, intervals in samples.items()},
        )

    def replicas(self, samples: Interval) -> list[int]:
        """Replicas that run an item of some samples, each once, in order."""
        return sorted({dp for owners in self.owners[slice(*samples)] for dp in owners})

    def num_items(self, dp: int) -> int:
        """Items of the microbatch that a replica runs."""
        return sum(owners.count(dp) for owners in self.owners)
