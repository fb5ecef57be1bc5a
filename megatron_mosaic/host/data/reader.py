"""Hands out one step's data after another, and reads the next step meanwhile."""

import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch.distributed as dist

from megatron_mosaic.errors import HostError, LayoutError
from megatron_mosaic.host.agreement import RankError
from megatron_mosaic.host.data.exchange import FactsExchange, Findings, agree_on_items
from megatron_mosaic.host.data.facts import FactsLayout, SampleFacts
from megatron_mosaic.host.data.items import StepOwners
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
        batches: Batch of every forward task, by module; None where nothing is read. Not of
            modules whose items are dealt.
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

    def request(self, owners: StepOwners, facts: Sequence[SampleFacts]) -> None:
        """Begins to read the items of the last step, of modules whose items are dealt."""
        ...

    def pick_up(self) -> Batches:
        """Returns the batches of what was requested."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatches:
    """What one rank needs of one step's data.

    Args:
        batches: Batch of every forward task, by module; None where nothing is read.
        facts: Facts of every sample of the step, on all ranks alike.
        first_sample: First sample of the step, counted from the beginning of the data.
        owners: Replica of every item, of modules whose items are dealt.
        ahead: The next step's, where it is wanted a step early and there is one.
    """

    batches: Batches
    facts: tuple[SampleFacts, ...]
    first_sample: int = 0
    owners: StepOwners = field(default_factory=dict)
    ahead: "StepBatches | None" = None

    @property
    def rows(self) -> Mapping[str, tuple[Runs, ...]]:
        """Where the boundary rows of every sample belong, by the module that makes them."""
        sources = self.facts[0].rows
        return {source: tuple(facts.rows[source] for facts in self.facts) for source in sources}


@dataclass(kw_only=True, slots=True)
class _Read:
    """A step that is read already, with its exchange under way.

    Args:
        batches: Batch of every forward task, by module; the items that are dealt come later.
        exchange: Its facts.
        first_sample: First sample of the step.
        state: Where the data stood before.
        owners: Replica of every item that is dealt, once this rank's are requested.
        unread: Why this rank could not read its items.
        failure: What all ranks know of that.
        is_whole: Whether all ranks have read their items.
    """

    batches: Batches
    exchange: FactsExchange
    first_sample: int
    state: Any
    owners: StepOwners | None = None
    unread: HostError | None = None
    failure: HostError | None = None
    is_whole: bool = False

    def known(self) -> tuple[SampleFacts, ...] | None:
        """Its facts, if they can be had: all ranks know alike, a failure waits for its turn."""
        try:
            return self.exchange.wait()
        except (HostError, LayoutError):
            return None

    def handed_out(
        self, facts: tuple[SampleFacts, ...], *, ahead: StepBatches | None = None
    ) -> StepBatches:
        """What the users of the step get."""
        return StepBatches(
            batches=self.batches,
            facts=facts,
            first_sample=self.first_sample,
            owners=self.owners or {},
            ahead=ahead,
        )


class StepReader:
    """Iterates over steps; hands every forward task of this rank the batch it reads.

    When a step is handed out, the next one is read and its exchange issued, so that it travels
    while the step computes. With worker processes to read takes no more than to pick up what they
    have ready. A failure to read ahead is raised when its step begins, so it never harms the step
    before, nor a run that ends there.

    Where items are dealt by cost, a step is read twice: first all else, for the facts say who runs
    which items; then the items. When a step is handed out the facts of the next one are there, its
    items begin to be read, and the step behind it is read without them. One exchange more follows
    when they are picked up, for a rank that could not read them must not start alone.

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
        deal: Deals the items of a step by its facts; None where no plan asks for it.

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
        deal: Callable[[Sequence[SampleFacts]], StepOwners] | None = None,
    ) -> None:
        self.source = source
        self.layout = layout
        self._next_sample = first_sample
        self._num_samples = num_samples
        self._group = group
        self._expected = expected
        self._hands_ahead = hands_ahead
        self._deal = deal
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
        self._add_items(step, facts)
        if step.failure is not None:
            raise step.failure
        self._read.popleft()
        if not self._read:
            self._read_one()
        ahead = self._following() if self._hands_ahead else None
        if ahead is not None and len(self._read) == 1:
            self._read_one()
        self._request_after(0 if ahead is None else 1)
        return step.handed_out(facts, ahead=ahead)

    @property
    def next_state(self) -> Any:
        """Where the data stood before the first step that is not handed out."""
        return self._read[0].state if self._read else self.source.state

    def next_facts(self) -> tuple[SampleFacts, ...] | None:
        """Facts of the step that comes next; None if there is none, or it cannot be read."""
        return self._read[0].known() if self._read else None

    def _following(self) -> StepBatches | None:
        """The step that comes next, if all ranks have read it whole."""
        step = self._read[0]
        facts = step.known()
        if facts is None:
            return None
        self._add_items(step, facts)
        return None if step.failure is not None else step.handed_out(facts)

    def _add_items(self, step: _Read, facts: Sequence[SampleFacts]) -> None:
        """Adds the items that are dealt to this rank, if all ranks have read theirs."""
        if self._deal is None or step.is_whole or step.failure is not None:
            return
        if step.owners is None:
            self._request(step, facts)
        try:
            if step.unread is None:
                step.batches = {**step.batches, **self.source.pick_up()}
        except Exception as error:  # noqa: BLE001 - the script's own; other ranks must not wait
            step.unread = _failure(error)
        try:
            agree_on_items(step.unread, group=self._group)
            step.is_whole = True
        except RankError as error:
            step.failure = error

    def _request_after(self, num_whole: int) -> None:
        """Requests the items of the first step that is not whole, and reads the one behind it."""
        if self._deal is None:
            return
        step = self._read[num_whole]
        facts = step.known()
        if facts is None or step.owners is not None:
            return
        self._request(step, facts)
        if step is self._read[-1]:
            self._read_one()

    def _request(self, step: _Read, facts: Sequence[SampleFacts]) -> None:
        assert self._deal is not None, "nothing is dealt"
        step.owners = self._deal(facts)
        try:
            self.source.request(step.owners, facts)
        except Exception as error:  # noqa: BLE001 - the script's own; other ranks must not wait
            step.unread = _failure(error)

    def _read_one(self) -> None:
        batches: Batches = {}
        try:
            share = self.source.read()
            batches, findings = share.batches, Findings(facts=share.facts)
        except StopIteration:
            findings = Findings(ended=True)
        except Exception as error:  # noqa: BLE001 - the script's own; other ranks must not wait
            findings = Findings(failure=_failure(error))
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


def _failure(error: Exception) -> HostError:
    """What the other ranks are told: an error of Mosaic's own as it is."""
    if isinstance(error, HostError):
        return error
    words = " ".join(str(error).split())
    shown = words if len(words) <= _SHOWN else f"{words[:_SHOWN]}..."
    if "DataLoader worker" in words:
        return HostError(
            f"data: loader='{shown}' must keep its processes on rank {dist.get_rank()}; look in "
            f"the machine's log for who ended it, such as its memory, or lower --num-workers"
        )
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return HostError(
        f"data: reading={type(error).__name__} in {frame.filename}:{frame.lineno} must succeed, "
        f"not say '{shown}'; repair the data, or let the script skip it"
    )
