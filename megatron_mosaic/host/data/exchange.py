"""Tells every rank the facts of all samples of a step, while the step before it computes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_mosaic.errors import HostError, LayoutError
from megatron_mosaic.host.agreement import RankError
from megatron_mosaic.host.data.facts import UNREAD, FactsLayout, SampleFacts
from megatron_mosaic.layout.ownership import Interval

_HEADER = 2  # who has an error, and whether the data ends


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """What one rank found when it read its share of a step.

    Args:
        facts: Samples of the step, counted from its first one, and their facts.
        ended: Whether the data ended before the step was complete.
        failure: Why the rank could not read.
    """

    facts: Sequence[tuple[Interval, Sequence[SampleFacts]]] = ()
    ended: bool = False
    failure: HostError | None = None


class FactsExchange:
    """One step's exchange, under way since it was created.

    Args:
        findings: This rank's.
        first_sample: First sample of the step, counted from the beginning of the data.
        num_samples: Samples of the step.
        layout: How facts travel.
        group: Group of the whole world that works on host memory and serves nothing else, for
            this operation is still open when the next users of other groups begin.

    Note:
        Collective over the world.
    """

    def __init__(
        self,
        findings: Findings,
        *,
        first_sample: int,
        num_samples: int,
        layout: FactsLayout,
        group: dist.ProcessGroup,
    ) -> None:
        self._failure = findings.failure
        self._first_sample = first_sample
        self._num_samples = num_samples
        self._layout = layout
        self._message = _message(findings, num_samples, layout)
        work = dist.all_reduce(self._message, op=dist.ReduceOp.MAX, group=group, async_op=True)
        assert work is not None, "every rank is in the group"
        self._work: dist.Work | None = work

    def wait(self) -> tuple[SampleFacts, ...] | None:
        """Waits for the facts of every sample of the step, on host memory alone.

        Returns:
            The facts, on all ranks alike; None if the data ended on some rank.

        Raises:
            RankError: Some rank could not read, on every rank.
            LayoutError: Two ranks read unlike samples, on every rank.
        """
        if self._work is not None:
            self._work.wait()
            self._work = None
        _check_nobody_speaks(self._message, self._failure)
        if self._message[1]:
            return None
        values = self._message[_HEADER:].reshape(2, self._num_samples, self._layout.size)
        greatest, least = values[0], -values[1]
        self._check_equal(greatest, least)
        return tuple(map(self._layout.facts, greatest.tolist()))

    def _check_equal(self, greatest: torch.Tensor, least: torch.Tensor) -> None:
        unlike = (greatest != least).nonzero()
        if not len(unlike):
            return
        sample, column = unlike[0].tolist()
        name = self._layout.name(column)
        raise LayoutError(
            f"data: {name}={greatest[sample, column].item()} of sample "
            f"{self._first_sample + sample} on one rank must equal the "
            f"{least[sample, column].item()} that another rank reads; make the data set return "
            f"the same sample for the same index, or shard a loader by parallel_state's "
            f"data-parallel rank"
        )


def agree_on_items(failure: HostError | None, *, group: dist.ProcessGroup) -> None:
    """Goes on if every rank has read its items.

    Args:
        failure: Why this rank could not.
        group: Of the whole world, on host memory.

    Raises:
        RankError: Some rank could not, on every rank.

    Note:
        Collective over the world.
    """
    speaks = torch.tensor([_voice(failure)])
    dist.all_reduce(speaks, op=dist.ReduceOp.MAX, group=group)
    _check_nobody_speaks(speaks, failure)


def _voice(failure: HostError | None) -> int:
    """What a rank says of itself: the first one with an error has the greatest entry."""
    return dist.get_world_size() - dist.get_rank() if failure else 0


def _check_nobody_speaks(loudest: torch.Tensor, failure: HostError | None) -> None:
    world_size = dist.get_world_size()
    speaker = world_size - int(loudest[0])
    if speaker < world_size:
        raise RankError(str(failure or f"data: rank {speaker} stopped"), speaker=speaker)


def _message(findings: Findings, num_samples: int, layout: FactsLayout) -> torch.Tensor:
    """Header, then every value and its negative: the maxima are the greatest and least value."""
    values = torch.full((2, num_samples, layout.size), UNREAD, dtype=torch.int64)
    for (start, stop), facts in findings.facts:
        own = torch.tensor([layout.row(each) for each in facts], dtype=torch.int64)
        values[0, start:stop] = torch.maximum(values[0, start:stop], own)
        # The least integer is its own negative: what is unread stays so.
        values[1, start:stop] = torch.maximum(values[1, start:stop], -own)
    header = torch.tensor([_voice(findings.failure), int(findings.ended)])
    return torch.cat([header, values.flatten()])
