"""Hands out one step's data after another, and reads the next step meanwhile."""

import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch.distributed as dist

from megatron_mosaic.errors import HostError, LayoutError
from megatron_mosaic.host.data.exchange import FactsExchange, Findings
from megatron_mosaic.host.data.facts import FactsLayout, SampleFacts
from megatron_mosaic.host.data.shares import Microbatches
from megatron_mosaic.host.families.family import Batch
from megatron_mosaic.layout.ownership import Runs
from megatron_mosaic.layout.rows import Interval

_SHOWN = 300  # characters of another library's message

Batches = Mapping[str, Mapping[Microbatches, Batch | None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What one rank reads of a step.

    Args:
        batches: Batch of every forward task, by module; None where nothing is read.
        facts: Samples of the step whose facts the rank knows.
    """

    batches: Batches
    facts: Sequence[tuple[Interval, Sequence[SampleFacts]]]


class StepSource(Protocol):
    """Reads this rank's share of one step after another."""

    state: Any
    """Where the data stood before the last step that was read, for checkpoints; None if nowhere."""

    def read(self) -> Share:
        """Reads the next step; raises StopIteration at the end of the data."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatches:
    """What one rank needs of one step's data.

    Args:
        batches: Batch of every forward task, by module; None where nothing is read.
        facts: Facts of every sample of the step, on all ranks alike.
        first_sample: First sample of the step, counted from the beginning of the data.
        ahead: The next step's, where it is wanted a step early and there is one.
    """

    batches: Batches
    facts: tuple[SampleFacts, ...]
    first_sample: int = 0
    ahead: "StepBatches | None" = None

    @property
    def rows(self) -> Mapping[str, tuple[Runs, ...]]:
        """Where the boundary rows of every sample belong, by the module that makes them."""
        sources = self.facts[0].rows
        return {source: tuple(facts.rows[source] for facts in self.facts) for source in sources}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Read:
    """A step that is read already, with its exchange under way."""

    batches: Batches
    exchange: FactsExchange
    first_sample: int
    state: Any

    def known(self) -> StepBatches | None:
        """The step, if it can be had: all ranks know alike, a failure waits for its turn."""
        try:
            facts = self.exchange.wait()
        except (HostError, LayoutError):
            return None
        if facts is None:
            return None
        return StepBatches(batches=self.batches, facts=facts, first_sample=self.first_sample)


class StepReader:
    """Iterates over steps; hands every forward task of this rank the batch it reads.

    When a step is handed out, the next one is read and its exchange issued, so that it travels
    while the step computes. With worker processes to read takes no more than to pick up what they
    have ready. A failure to read ahead is raised when its step begins, so it never harms the step
    before, nor a run that ends there.

    Args:
        source: Reads this rank's share.
        first_sample: Samples consumed before.
        num_samples: Samples of a step.
        layout: How facts of samples travel.
        group: Group of the whole world that works on host memory, of readers alone: all ranks
            ask their readers in the same order.
        expected: Facts of the first step, where they are known from a checkpoint.
        hands_ahead: Whether each step is handed out with the one after it. Then one more is read
            meanwhile, so that no rank waits for an exchange that has only just begun.

    Note:
        Iterating is collective over the world.
    """

    def __init__(
        self,
        source: StepSource,
        *,
        first_sample: int,
        num_samples: int,
        layout: FactsLayout,
        group: dist.ProcessGroup,
        expected: Sequence[SampleFacts] | None = None,
        hands_ahead: bool = False,
    ) -> None:
        self.source = source
        self.layout = layout
        self._next_sample = first_sample
        self._num_samples = num_samples
        self._group = group
        self._expected = expected
        self._hands_ahead = hands_ahead
        self._read: deque[_Read] = deque()
        self._ended = False

    def __iter__(self) -> Iterator[StepBatches]:
        return self

    def __next__(self) -> StepBatches:
        if self._ended:
            raise StopIteration
        if not self._read:
            self._read_one()
        step = self._read[0]
        facts = step.exchange.wait()
        if facts is None:
            self._ended = True
            raise StopIteration
        self._check_expected(facts)
        self._read.popleft()
        if not self._read:
            self._read_one()
        ahead = self._read[0].known() if self._hands_ahead else None
        if ahead is not None and len(self._read) == 1:
            self._read_one()
        return StepBatches(
            batches=step.batches, facts=facts, first_sample=step.first_sample, ahead=ahead
        )

    @property
    def next_state(self) -> Any:
        """Where the data stood before the first step that is not handed out."""
        return self._read[0].state if self._read else self.source.state

    def next_facts(self) -> tuple[SampleFacts, ...] | None:
        """Facts of the step that comes next; None if there is none, or it cannot be read."""
        step = self._read[0].known() if self._read else None
        return None if step is None else step.facts

    def _read_one(self) -> None:
        batches: Batches = {}
        try:
            share = self.source.read()
            batches, findings = share.batches, Findings(facts=share.facts)
        except StopIteration:
            findings = Findings(ended=True)
        except HostError as error:
            findings = Findings(failure=error)
        except Exception as error:  # noqa: BLE001 - the script's own; other ranks must not wait
            findings = Findings(failure=_unreadable(error))
        exchange = FactsExchange(
            findings,
            first_sample=self._next_sample,
            num_samples=self._num_samples,
            layout=self.layout,
            group=self._group,
        )
        self._read.append(
            _Read(
                batches=batches,
                exchange=exchange,
                first_sample=self._next_sample,
                state=self.source.state,
            )
        )
        self._next_sample += self._num_samples

    def _check_expected(self, facts: Sequence[SampleFacts]) -> None:
        expected, self._expected = self._expected, None
        if expected is not None and tuple(expected) != tuple(facts):
            raise LayoutError(
                f"data: first_step={[each.text_checksum for each in facts[:2]]}... must be the "
                f"samples {[each.text_checksum for each in expected[:2]]}... that followed the "
                f"checkpoint; let the script restore the loader's state, see what it printed"
            )


def _unreadable(error: Exception) -> HostError:
    words = " ".join(str(error).split())
    shown = words if len(words) <= _SHOWN else f"{words[:_SHOWN]}..."
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return HostError(
        f"data: reading={type(error).__name__} in {frame.filename}:{frame.lineno} must succeed, "
        f"not say '{shown}'; repair the data, or let the script skip it"
    )
