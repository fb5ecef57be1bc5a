"""Judges what the ranks of a rehearsal recorded."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, zip_longest

import numpy as np

from megatron_mosaic.comm.replay import ReplayError, replay
from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.rehearsal.compare import compare, whole
from megatron_mosaic.rehearsal.expected import expected_groups, expected_walk
from megatron_mosaic.rehearsal.job import SAVED_STEP, Runs
from megatron_mosaic.rehearsal.record import Record
from megatron_mosaic.rehearsal.tiny import VISION

MOST_LINES = 8  # of one finding
CHECKED_FIELDS = ("tp", "cp", "pp", "dp", "ep", "expt_tp", "expt_dp")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one look at the records says.

    Args:
        subject: What was looked at.
        lines: What is wrong; none if all is well.
    """

    subject: str
    lines: tuple[str, ...] = ()

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
    looks: Mapping[str, Callable[[], Iterable[str]]] = {
        "groups": lambda: _groups(plan, through),
        "layers": lambda: _layers(plan, through),
        "schedule": lambda: _schedule(plan, through),
        "order of communication": lambda: _communication(through),
        "parity with one process": lambda: _parity(through, reference),
        "checkpoint": lambda: _checkpoint(runs),
    }
    return [Finding(subject=subject, lines=tuple(look())) for subject, look in looks.items()]


def ended_findings(text: str) -> list[Finding]:
    """What is known where the ranks did not come to the end.

    Args:
        text: What each rank wrote, and where it was.
    """
    said = re.findall(r"^(?:error: |\w*(?:Error|Exception)\b: )(.*)$", text, re.MULTILINE)
    first = text.partition("\n")[0]
    return [Finding(subject="run to the end", lines=(first, *dict.fromkeys(said)))]


def _groups(plan: Plan, records: Sequence[Record]) -> Iterable[str]:
    for rank, record in enumerate(records):
        for name, own in record.groups.items():
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


def _schedule(plan: Plan, records: Sequence[Record]) -> Iterable[str]:
    for rank, record in enumerate(records):
        last = len(record.walked) - 1
        trained = [each for each in record.walked if not each.forward_only]
        for number, walked in enumerate(record.walked):
            is_last = walked.forward_only or walked is trained[-1]
            expected = expected_walk(
                plan,
                rank,
                forward_only=walked.forward_only,
                is_first=walked is trained[0],
                is_last=is_last,
            )
            for position, (own, other) in enumerate(zip_longest(walked.steps, expected)):
                if own != other:
                    yield (
                        f"rank {rank}: step {position} of walk {number} of {last}={own} must be "
                        f"{other}"
                    )
                    break


def _communication(records: Sequence[Record]) -> Iterable[str]:
    try:
        replay({rank: record.communication for rank, record in enumerate(records)})
    except ReplayError as error:
        yield from str(error).splitlines()


def _parity(records: Sequence[Record], reference: Record) -> Iterable[str]:
    try:
        result = compare(whole(records), whole([reference]), adam=True)
    except AssertionError as error:
        yield " ".join(str(error).split())[:400]
        return
    yield from result.failures


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
