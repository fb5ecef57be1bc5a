"""What one rank does in one step, task by task: post transfers, wait for them, compute."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.graph import Stage, hosted_stages, needs_backward, stage_order
from megatron_mosaic.schedule.schedule import Schedule
from megatron_mosaic.schedule.task import Task

TransferKind = Literal["activation", "gradient"]
Needs = Mapping[tuple[str, Stage], Sequence[tuple[str, Stage]]]


class Edge(NamedTuple):
    """What joins two stages: of one module, or the last of a module and the first of another."""

    source: str
    source_stage: int
    destination: str
    destination_stage: int

    @property
    def ends(self) -> tuple[Stage, Stage]:
        """Where activations come from, and where they go to."""
        return Stage(self.source, self.source_stage), Stage(
            self.destination, self.destination_stage
        )

    def __str__(self) -> str:
        return f"{self.source}.{self.source_stage} -> {self.destination}.{self.destination_stage}"


class Transfer(NamedTuple):
    """One microbatch on its way over an edge: activations forward, gradients back."""

    kind: TransferKind
    edge: Edge
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind} {self.microbatch} of {self.edge}"


class Compute(NamedTuple):
    """Run the task."""

    task: Task


class Post(NamedTuple):
    """Issue this rank's sends and receives of the transfer, without waiting.

    Each edge and kind has a communicator of its own, on which every participant posts the
    microbatches in the same order.
    """

    transfer: Transfer


class Wait(NamedTuple):
    """Block until what this rank receives in the transfer, posted before, has arrived."""

    transfer: Transfer


Step = Compute | Post | Wait


def edges_of(plan: Plan) -> tuple[Edge, ...]:
    """Edges between modules, then those between the stages of each module."""
    between = [
        Edge(source, plan.modules[source].num_stages - 1, destination, 0)
        for source, destination in plan.edges
    ]
    within = [
        Edge(name, stage, name, stage + 1)
        for name, placement in plan.modules.items()
        for stage in range(placement.num_stages - 1)
    ]
    return (*between, *within)


def participants(plan: Plan, edge: Edge) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ranks of the source stage and of the destination stage, each in grid order."""
    source = plan.modules[edge.source].stage_ranks(edge.source_stage)
    destination = plan.modules[edge.destination].stage_ranks(edge.destination_stage)
    return source, destination


def communicators(plan: Plan, edge: Edge) -> tuple[tuple[int, ...], ...]:
    """Rank lists that take part in a transfer of the edge together.

    Between modules all ranks of both stages do, sorted. Between the stages of one module there is
    one pair for each position of the tensor, context and data axes, or one rank that hosts both.
    """
    source, destination = participants(plan, edge)
    if edge.source == edge.destination:
        pairs = zip(source, destination, strict=True)
        return tuple((one,) if one == other else (one, other) for one, other in pairs)
    return (tuple(sorted({*source, *destination})),)


def tasks_of(schedule: Schedule, plan: Plan, module: str) -> list[tuple[int, ...]]:
    """Microbatches of every forward task of a module's last stage."""
    last = plan.modules[module].num_stages - 1
    rank = plan.modules[module].stage_ranks(last)[0]
    return [
        task.microbatches
        for task in schedule.tasks[rank]
        if task.module == module and task.stage == last and task.kind == "F"
    ]


def has_gradient(plan: Plan, edge: Edge) -> bool:
    """Whether gradients travel back over the edge: not to a source without backward pass."""
    return needs_backward(plan, edge.source)


def steps_of(plan: Plan, schedule: Schedule, rank: int) -> tuple[Step, ...]:
    """Expands a rank's tasks into what the engine walks.

    A rank that only receives posts directly before it waits, or early if the schedule says so.
    One that hosts both ends of an edge posts its sends and receives at once, after the task that
    produces, so it never posts twice.

    What a module that runs ahead made in the step before is sent by ranks that only send it at
    the beginning, and by ranks that use it before they wait for it.
    """
    hosted = set(hosted_stages(plan, rank))
    edges = tuple(edge for edge in edges_of(plan) if not hosted.isdisjoint(edge.ends))
    on = _Ends(
        source=frozenset(edge for edge in edges if edge.ends[0] in hosted),
        destination=frozenset(edge for edge in edges if edge.ends[1] in hosted),
        returning=frozenset(edge for edge in edges if has_gradient(plan, edge)),
        kept=frozenset(edge for edge in edges if crosses_steps(schedule.ahead, edge)),
        early=frozenset(edge for edge in edges if schedule.receives_early and _joins_modules(edge)),
    )
    steps: list[Step] = [
        Post(Transfer("activation", edge, microbatch))
        for edge in edges
        if edge in on.kept & on.source - on.destination
        for microbatch in range(schedule.num_microbatches)
    ]
    for task in schedule.tasks[rank]:
        arriving, leaving = transfers_of(edges, on.returning, task)
        steps += [Post(transfer) for transfer in arriving if on.posts_at_wait(transfer)]
        steps += [Wait(transfer) for transfer in arriving]
        steps.append(Compute(task))
        if not schedule.forward_only:
            leaving += _early_receives(on, leaving)
        steps += [Post(transfer) for transfer in leaving if transfer.edge not in on.kept]
    return tuple(steps)


def crosses_steps(ahead: frozenset[str], edge: Edge) -> bool:
    """Whether an edge leads from one of the modules that run a step ahead to one that does not."""
    return edge.source in ahead and edge.destination not in ahead


def needs_of(plan: Plan, schedule: Schedule) -> Needs:
    """For each pass and stage the passes and stages that it takes its input from.

    What a module that runs ahead gives to the step is no input: it was made before.
    """
    needs: dict[tuple[str, Stage], list[tuple[str, Stage]]] = {}
    for stage in stage_order(plan):
        needs["F", stage] = []
        needs["B", stage] = [("F", stage)]
    for edge in edges_of(plan):
        here, there = edge.ends
        if not crosses_steps(schedule.ahead, edge):
            needs["F", there].append(("F", here))
        needs["B", here].append(("B", there))
    return needs


def transfers_of(
    edges: Iterable[Edge], returning: Collection[Edge], task: Task
) -> tuple[list[Transfer], list[Transfer]]:
    """Transfers that a task waits for, and those that carry what it produces.

    Args:
        edges: Edges of its stage, and maybe others.
        returning: Those over which gradients travel back.
        task: The task.
    """
    here = (task.module, task.stage)
    into = [edge for edge in edges if edge.ends[1] == here]
    out_of = [edge for edge in edges if edge.ends[0] == here]
    if task.kind == "F":
        kind, before, after = "activation", into, out_of
    else:
        kind, before, after = "gradient", out_of, [edge for edge in into if edge in returning]
    return (
        [Transfer(kind, edge, m) for edge in before for m in task.microbatches],
        [Transfer(kind, edge, m) for edge in after for m in task.microbatches],
    )


class _Ends(NamedTuple):
    """Edges that one rank takes part in, and what is special about some of them.

    Args:
        source: Edges that start at a stage of the rank.
        destination: Edges that end at one.
        returning: Edges over which gradients travel back.
        kept: Edges whose activations were made in the step before.
        early: Edges whose gradients may have their receives posted when activations are sent.
    """

    source: frozenset[Edge]
    destination: frozenset[Edge]
    returning: frozenset[Edge]
    kept: frozenset[Edge]
    early: frozenset[Edge]

    def posts_at_wait(self, transfer: Transfer) -> bool:
        """Whether this rank, which waits for a transfer, has not posted it before."""
        edge = transfer.edge
        if transfer.kind == "activation":
            return edge not in self.source or edge in self.kept
        return edge not in self.destination and edge not in self.early


def _early_receives(on: _Ends, leaving: list[Transfer]) -> list[Transfer]:
    """Gradients of what a task sends, if this rank posts their receives now."""
    return [
        Transfer("gradient", edge, microbatch)
        for kind, edge, microbatch in leaving
        if kind == "activation"
        and edge in on.early & on.returning
        and edge not in on.destination | on.kept
    ]


def _joins_modules(edge: Edge) -> bool:
    return edge.source != edge.destination
