"""Judges what the ranks of a rehearsal recorded."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, zip_longest

import numpy as np

from megatron_mosaic.comm.replay import Issue, ReplayError, replay
from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.rehearsal.compare import compare, whole
from megatron_mosaic.rehearsal.expected import expected_groups, expected_walk
from megatron_mosaic.rehearsal.job import SAVED_STEP, Runs
from megatron_mosaic.rehearsal.record import Groups, Record
from megatron_mosaic.rehearsal.tiny import VISION

MOST_LINES = 8  # of one finding
CHECKED_FIELDS = ("tp", "cp", "pp", "dp", "ep", "expt_tp", "expt_dp")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one look at the records says.

    Args:
        subject: What was looked at.
        lines: What is wrong; none if all is well.
        measure: How much was looked at, or how close it is.
    """

    subject: str
    lines: tuple[str, ...] = ()
    measure: str = ""

    @property
    def passed(self) -> bool:
        """Whether all is well."""
        return not self.lines

    def shown(self) -> tuple[str, ...]:
        """The first lines, and how many there are beside them."""
        others = len(self.lines) - MOST_LINES
        return (*self.lines[:MOST_LINES], *((f"and {others} more",) if others > 0 else ()))


def findings_of(plan: Plan, runs: Sequence[Runs], reference: Record) -> list[Finding]:
    """Looks at everything that ranks which came to the end have recorded.

    Args:
        plan: The plan.
        runs: By rank.
        reference: What one process recorded.
    """
    through = [each.through for each in runs]
    return [
        Finding(subject="groups", lines=tuple(_groups(plan, [each.groups for each in through]))),
        Finding(subject="layers", lines=tuple(_layers(plan, through))),
        _schedule(plan, through),
        _communication(through),
        _parity(through, reference),
        Finding(
            subject="checkpoint",
            lines=tuple(_checkpoint(runs)),
            measure="saved, loaded and trained on, to the bit",
        ),
    ]


def ended_findings(plan: Plan, text: str, groups: Sequence[Groups]) -> list[Finding]:
    """What is known where the ranks did not come to the end.

    Args:
        plan: The plan.
        text: What each rank wrote, and where it was.
        groups: By rank, as far as they had any.
    """
    said = re.findall(r"^(?:error: |\w*(?:Error|Exception)\b: )(.*)$", text, re.MULTILINE)
    first = text.partition("\n")[0]
    return [
        Finding(subject="groups", lines=tuple(_groups(plan, groups))),
        Finding(subject="run to the end", lines=(first, *dict.fromkeys(said))),
    ]


def _groups(plan: Plan, groups: Sequence[Groups]) -> Iterable[str]:
    for rank, modules in enumerate(groups):
        for name, own in modules.items():
            expected = expected_groups(plan.modules[name], rank)
            for field in CHECKED_FIELDS:
                if field in own and own[field] != expected[field]:
                    yield (
                        f"rank {rank}: {field} group of {name}={list(own[field])} must be "
                        f"{list(expected[field])}"
                    )


def _layers(plan: Plan, records: Sequence[Record]) -> Iterable[str]:
    """Equal results say nothing of which rank holds which layers."""
    for name, placement in plan.modules.items():
        if placement.layers_per_stage is None or name not in (LANGUAGE, VISION):
            continue
        ends = list(accumulate(placement.layers_per_stage))
        for rank in placement.ranks:
            expected = sorted(
                layer
                for stage in placement.stages_of(rank)
                for layer in range(ends[stage] - placement.layers_per_stage[stage], ends[stage])
            )
            own = sorted({int(found[1]) for found in _layer_names(name, records[rank])})
            if own != expected:
                yield f"rank {rank}: layers of {name}={own} must be {expected}"


def _layer_names(module: str, record: Record) -> Iterator[re.Match[str]]:
    """Weights of a module's layers, with the layer's number in the first group."""
    pattern = rf".*{module}.*\.layers\.(\d+)\."
    yield from filter(None, (re.match(pattern, name) for name in record.weights[0]))


def _schedule(plan: Plan, records: Sequence[Record]) -> Finding:
    num_steps = sum(len(walked.steps) for record in records for walked in record.walked)
    lines = [line for rank, record in enumerate(records) for line in _walks(plan, rank, record)]
    return Finding(
        subject="schedule", lines=tuple(lines), measure=f"{num_steps} tasks and transfers"
    )


def _walks(plan: Plan, rank: int, record: Record) -> Iterator[str]:
    """Says where a rank first left its schedule, in every step of training and evaluation."""
    trained = [each for each in record.walked if not each.forward_only]
    for number, walked in enumerate(record.walked):
        expected = expected_walk(
            plan,
            rank,
            forward_only=walked.forward_only,
            is_first=walked is trained[0],
            is_last=walked.forward_only or walked is trained[-1],
        )
        for position, (own, other) in enumerate(zip_longest(walked.steps, expected)):
            # Named tuples of unlike types may be equal.
            if type(own) is not type(other) or own != other:
                yield f"rank {rank}: step {position} of walk {number}={own} must be {other}"
                break


def _communication(records: Sequence[Record]) -> Finding:
    lines: tuple[str, ...] = ()
    try:
        replay({rank: record.communication for rank, record in enumerate(records)})
    except ReplayError as error:
        lines = tuple(str(error).splitlines())
    num_issues = sum(
        isinstance(entry, Issue) for record in records for entry in record.communication
    )
    return Finding(
        subject="order of communication", lines=lines, measure=f"{num_issues} operations"
    )


def _parity(records: Sequence[Record], reference: Record) -> Finding:
    subject = "parity with one process"
    try:
        result = compare(whole(records), whole([reference]), adam=True)
    except AssertionError as error:
        return Finding(subject=subject, lines=(" ".join(str(error).split())[:400],))
    worst = max(result.worst_gradient, result.worst_weight)
    return Finding(
        subject=subject,
        lines=tuple(result.failures),
        measure=f"{len(reference.weights[0])} tensors, {worst:.0e} apart at most",
    )


def _checkpoint(runs: Sequence[Runs]) -> Iterable[str]:
    """A resumed run begins with the weights that were saved, and ends as the first one, to the bit.

    It does only if the optimizer's states are those that were saved too.
    """
    for rank, (through, resumed, _) in enumerate(runs):
        if through.losses[SAVED_STEP:] != resumed.losses:
            yield f"rank {rank}: losses={resumed.losses} must be {through.losses[SAVED_STEP:]}"
        for own, other, when in zip(
            resumed.weights, through.weights[SAVED_STEP:], ("loaded", "trained on"), strict=True
        ):
            unlike = [
                name
                for name, shard in other.items()
                if name not in own or not np.array_equal(own[name].values, shard.values)
            ]
            if unlike:
                yield f"rank {rank}: weights {when}={unlike[:3]} must be as they were saved"
