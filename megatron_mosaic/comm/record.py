"""Notes the order in which this rank issues collectives, sends and receives, and waits for them.

Wrapped are the methods of torch's process groups, below ``torch.distributed``: so it does not
matter by which name, or how early, a caller imported a function. Operations that C++ issues by
itself (functional collectives, torch's own DDP) are not seen.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, Work, distributed_c10d

from megatron_mosaic.comm.replay import P2P, Entry, Issue, Part, Wait


class _Collective(NamedTuple):
    """What a method of a process group does.

    Args:
        operation: Name in the record.
        sized: Position of the argument that gives the size; None if there is none.
        sizes_agree: Whether that size must be equal on all members.
    """

    operation: str
    sized: int | None
    sizes_agree: bool = True


# The sized argument of a gather is its input, of a scatter its output: one rank's share.
COLLECTIVES = {
    "allreduce": _Collective("all_reduce", 0),
    "allreduce_coalesced": _Collective("all_reduce", 0),
    "broadcast": _Collective("broadcast", 0),
    "reduce": _Collective("reduce", 0),
    "allgather": _Collective("all_gather", 1),
    "allgather_coalesced": _Collective("all_gather", 1),
    "_allgather_base": _Collective("all_gather", 1),
    "all_gather_single": _Collective("all_gather", 1),
    "allgather_into_tensor_coalesced": _Collective("all_gather", 1),
    "all_gather_single_coalesced": _Collective("all_gather", 1),
    "reduce_scatter": _Collective("reduce_scatter", 0),
    "_reduce_scatter_base": _Collective("reduce_scatter", 0),
    "reduce_scatter_single": _Collective("reduce_scatter", 0),
    "reduce_scatter_tensor_coalesced": _Collective("reduce_scatter", 0),
    "reduce_scatter_single_coalesced": _Collective("reduce_scatter", 0),
    "alltoall": _Collective("all_to_all", 1, sizes_agree=False),
    "alltoall_base": _Collective("all_to_all", 1, sizes_agree=False),
    "all_to_all_single": _Collective("all_to_all", 1, sizes_agree=False),
    "gather": _Collective("gather", 1, sizes_agree=False),
    "scatter": _Collective("scatter", 0, sizes_agree=False),
    "barrier": _Collective("barrier", None),
    "monitored_barrier": _Collective("barrier", None),
}
KINDS: tuple[Literal["send", "recv"], ...] = ("send", "recv")
WAITS = ("wait", "synchronize", "block_current_stream")  # of a Work


def _no_lane() -> str:
    return ""


@contextmanager
def record(lane: Callable[[], str] = _no_lane) -> Iterator[list[Entry]]:
    """Records what this rank issues while the context is open, into the list that it gives.

    Args:
        lane: Tells in which lane the rank launches; empty is that of the training loop.

    Note:
        It replaces methods of torch's classes for the time being: for tests and benchmarks.
    """
    recorder = _Recorder(lane)
    with ExitStack() as stack:
        for name, collective in COLLECTIVES.items():
            if hasattr(ProcessGroup, name):  # names differ between versions of torch
                wrap = functools.partial(recorder.collective, collective)
                stack.enter_context(_replaced(ProcessGroup, name, wrap))
        for kind in KINDS:
            wrap = functools.partial(recorder.part, kind)
            stack.enter_context(_replaced(ProcessGroup, kind, wrap))
        stack.enter_context(_replaced(ProcessGroup, "_start_coalescing", recorder.start))
        stack.enter_context(_replaced(ProcessGroup, "_end_coalescing", recorder.end))
        for module in (dist, distributed_c10d):
            stack.enter_context(_replaced(module, "batch_isend_irecv", recorder.batch))
        for name in WAITS:
            stack.enter_context(_replaced(Work, name, recorder.wait))
        yield recorder.entries


@contextmanager
def _replaced(owner: Any, name: str, wrap: Callable[..., Any]) -> Iterator[None]:
    original = getattr(owner, name)
    stored = vars(owner)[name]  # getattr unbinds what pybind11 stores: a bare function would stay

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return wrap(original, *args, **kwargs)

    setattr(owner, name, wrapper)
    try:
        yield
    finally:
        setattr(owner, name, stored)


class _Recorder:
    """The record of one rank, and the batch that is open."""

    def __init__(self, lane: Callable[[], str]) -> None:
        self.entries: list[Entry] = []
        self._lane = lane
        self._num_issues = 0
        self._issues_of: WeakKeyDictionary[Work, tuple[int, ...]] = WeakKeyDictionary()
        self._depth = 0  # of nested batches
        self._parts: list[Part] = []
        self._group: ProcessGroup | None = None
        self._batched: list[int] = []

    def collective(
        self,
        collective: _Collective,
        original: Callable[..., Any],
        group: ProcessGroup,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Records a collective and runs it."""
        tensors = [] if collective.sized is None else list(_tensors(args[collective.sized]))
        num_elements = sum(tensor.numel() for tensor in tensors)
        index = self._issue(
            group,
            operation=collective.operation,
            num_elements=num_elements if collective.sizes_agree else None,
            num_bytes=sum(tensor.nbytes for tensor in tensors),
        )
        return self._tracked(original(group, *args, **kwargs), [index])

    def part(
        self,
        kind: Literal["send", "recv"],
        original: Callable[..., Any],
        group: ProcessGroup,
        tensors: Sequence[torch.Tensor],
        peer: int,
        *args: Any,
    ) -> Any:
        """Records a send or receive and runs it; alone, it is a batch of one."""
        with self._open_batch() as batched:
            self._group = group
            num_elements = sum(tensor.numel() for tensor in tensors)
            num_bytes = sum(tensor.nbytes for tensor in tensors)
            self._parts.append(Part(kind, _members(group)[peer], num_elements, num_bytes))
        return self._tracked(original(group, tensors, peer, *args), batched)

    def batch(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Records the sends and receives of a call as one batch."""
        with self._open_batch() as batched:
            works = original(*args, **kwargs)
        for work in works:
            self._tracked(work, batched)
        return works

    def start(self, original: Callable[..., Any], group: ProcessGroup, *args: Any) -> Any:
        """Starts a coalesced batch."""
        self._depth += 1
        return original(group, *args)

    def end(self, original: Callable[..., Any], group: ProcessGroup, *args: Any) -> Any:
        """Ends a coalesced batch, whose work stands for all it holds."""
        batched = self._close_batch()
        return self._tracked(original(group, *args), batched)

    def wait(self, original: Callable[..., Any], work: Work, *args: Any) -> Any:
        """Records that this rank waits for a work, and waits."""
        self._note_wait(self._issues_of.get(work, ()))
        return original(work, *args)

    @contextmanager
    def _open_batch(self) -> Iterator[list[int]]:
        batched: list[int] = []
        self._depth += 1
        try:
            yield batched
        finally:
            batched += self._close_batch()

    def _close_batch(self) -> list[int]:
        self._depth -= 1
        if self._depth:
            return []
        parts, self._parts = self._parts, []
        if parts:
            assert self._group is not None
            num_bytes = sum(part.num_bytes for part in parts)
            self._issue(self._group, operation=P2P, num_bytes=num_bytes, parts=tuple(parts))
        batched, self._batched = self._batched, []
        return batched

    def _issue(
        self,
        group: ProcessGroup,
        *,
        operation: str,
        num_bytes: int,
        num_elements: int | None = None,
        parts: tuple[Part, ...] = (),
    ) -> int:
        members = _members(group)
        index = self._num_issues
        self._num_issues += 1
        name = f"{group.group_desc or 'group'}#{group.group_name}{list(members)}"
        issue = Issue(index, name, members, operation, num_elements, num_bytes, parts, self._lane())
        self.entries.append(issue)
        self._batched.append(index)
        return index

    def _tracked(self, work: Work | None, issues: Sequence[int]) -> Work | None:
        if self._depth == 0:
            self._batched = []
            if work is None:
                # A synchronous call whose backend has waited by itself.
                self._note_wait(issues)
        if work is not None:
            self._issues_of[work] = (*self._issues_of.get(work, ()), *issues)
        return work

    def _note_wait(self, issues: Iterable[int]) -> None:
        self.entries += [Wait(index) for index in issues]


def _members(group: ProcessGroup) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))


def _tensors(argument: Any) -> Iterator[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        yield argument
    else:
        for item in argument:
            yield from _tensors(item)
