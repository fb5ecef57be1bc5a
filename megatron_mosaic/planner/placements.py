"""Ways to place encoders around a language model, and the schedules that go with them."""

from collections.abc import Iterator
from itertools import product

from megatron_mosaic.cost.sizes import ParallelSizes
from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.layout.plan import ScheduleKind
from megatron_mosaic.planner.candidate import Candidate, EncoderChoice, Host
from megatron_mosaic.planner.legal_sizes import context_sizes, encoder_sizes, tensor_sizes
from megatron_mosaic.planner.problem import Problem

MAX_MIXED = 4
"""Encoders up to which every mixture of shared and own ranks is tried; above, one may differ."""


def schedules(
    problem: Problem, language: ParallelSizes, num_microbatches: int
) -> Iterator[tuple[ScheduleKind, int]]:
    """Yields the schedules of a language model, and microbatches of an encoder's task."""
    pins, kind = problem.pins, searched_kind(problem.pins.kind)
    if language.pp == 1 and kind in (None, "no_pipelining"):
        yield "no_pipelining", 1
    if kind == "1f1b" or (kind is None and (problem.encoders or language.pp > 1)):
        yield "1f1b", 1
    if problem.encoders and kind in (None, "colocated"):
        groups = groups_of_microbatches(num_microbatches)
        if language.pp == 1 and kind is None:
            groups = groups[1:]  # one microbatch at a time is what no_pipelining does
        if pins.encoder_group is not None:
            groups = [pins.encoder_group] if num_microbatches % pins.encoder_group == 0 else []
        for group in groups:
            yield "colocated", group


def searched_kind(kind: ScheduleKind | None) -> ScheduleKind | None:
    """The schedule whose closed form stands for one that is only simulated."""
    match kind:
        case "interleaved":
            return "1f1b"
        case "bubble_fill" | "concurrent":
            return "colocated"
    return kind


def groups_of_microbatches(num_microbatches: int) -> list[int]:
    """Sizes of a group: powers of two that divide the microbatches, and all of them."""
    groups, group = [], 1
    while group < num_microbatches:
        if num_microbatches % group == 0:
            groups.append(group)
        group *= 2
    return [*groups, num_microbatches]


def assignments(
    problem: Problem, language: ParallelSizes, kind: ScheduleKind
) -> Iterator[tuple[Host, ...]]:
    """Yields hosts of all encoders that a schedule can have."""
    count = len(problem.encoders)
    if not count:
        yield ()
        return
    if kind == "no_pipelining":
        yield ("language",) * count
        return
    spare = problem.num_gpus - language.num_ranks
    if kind == "1f1b":
        if spare >= count:
            yield ("apart",) * count
        if spare and count > 1:
            yield ("together",) * count
        return
    yield ("language",) * count
    if language.pp > 1:
        yield ("first_stage",) * count
    if spare and count > 1:
        yield from _mixtures(count)


def _mixtures(count: int) -> Iterator[tuple[Host, ...]]:
    hosts: tuple[Host, ...] = ("language", "apart")
    for mixture in product(hosts, repeat=count):
        apart = mixture.count("apart")
        if 0 < apart < count and (count <= MAX_MIXED or apart in (1, count - 1)):
            yield mixture


def encoder_options(
    problem: Problem,
    name: str,
    host: Host,
    language: ParallelSizes,
    *,
    num_samples: int,
) -> Iterator[EncoderChoice]:
    """Yields all choices of one encoder on a host.

    Args:
        problem: What is asked.
        name: The encoder.
        host: Where it runs.
        language: Sizes of the language model.
        num_samples: Samples of one of its tasks, of all replicas.
    """
    spare = problem.num_gpus - language.num_ranks
    num_ranks = {
        "language": language.num_ranks,
        "first_stage": language.num_ranks // language.pp,
        "apart": spare,
        "together": spare,
    }[host]
    for sizes in encoder_sizes(
        name,
        problem,
        num_ranks=num_ranks,
        all_of_them=host != "apart",
        num_samples=num_samples,
    ):
        yield EncoderChoice(name=name, sizes=sizes, host=host)


def homogeneous(
    problem: Problem, language: ParallelSizes, micro_batch_size: int
) -> Iterator[Candidate]:
    """Yields what stock arguments run: encoders with the language model's sizes and first stage.

    With context parallelism all its ranks run an encoder alike; where the encoder allows it, they
    may also split its sequences.
    """
    kind: ScheduleKind = "no_pipelining" if language.pp == 1 else "colocated"
    if not problem.encoders:
        kind = "no_pipelining" if language.pp == 1 else "1f1b"
    modules = problem.model.modules
    if not all(language.tp in tensor_sizes(modules[n], problem) for n in problem.encoders):
        return
    splits = [1] if language.cp == 1 else [1, language.cp]
    for cp in splits:
        if not all(
            cp in context_sizes(modules[name], problem, tp=language.tp) for name in problem.encoders
        ):
            continue
        whole: Host = "language" if language.pp == 1 else "first_stage"
        sizes = ParallelSizes(
            tp=language.tp, cp=cp, dp=language.dp, etp=language.tp, recompute=language.recompute
        )
        host: Host = whole if cp == language.cp else "replicated"
        candidate = Candidate(
            micro_batch_size=micro_batch_size,
            language=language,
            encoders=tuple(
                EncoderChoice(name=name, sizes=sizes, host=host) for name in problem.encoders
            ),
            kind=kind,
        )
        if allowed(problem, candidate):
            yield candidate


def allowed(problem: Problem, candidate: Candidate) -> bool:
    """Whether a candidate has what is pinned."""
    pins = problem.pins
    sizes = {LANGUAGE: candidate.language} | {e.name: e.sizes for e in candidate.encoders}
    return (
        searched_kind(pins.kind) in (None, candidate.kind)
        and pins.placement in (None, candidate.placement)
        and (pins.encoder_group is None or pins.encoder_group == candidate.encoder_group)
        and all(
            getattr(sizes[name], size) == value
            for name, pinned in pins.modules.items()
            for size, value in pinned.items()
            if size != "layers_per_stage"
        )
    )


def every_candidate(
    problem: Problem, language: ParallelSizes, micro_batch_size: int
) -> Iterator[Candidate]:
    """Yields all candidates around a language model, one by one."""
    num_microbatches = problem.num_microbatches(micro_batch_size=micro_batch_size, dp=language.dp)
    yield from homogeneous(problem, language, micro_batch_size)
    for kind, group in schedules(problem, language, num_microbatches):
        for hosts in assignments(problem, language, kind):
            choices = [
                list(
                    encoder_options(
                        problem,
                        name,
                        host,
                        language,
                        num_samples=group * micro_batch_size * language.dp,
                    )
                )
                for name, host in zip(problem.encoders, hosts, strict=True)
            ]
            for encoders in product(*choices):
                candidate = Candidate(
                    micro_batch_size=micro_batch_size,
                    language=language,
                    encoders=encoders,
                    kind=kind,
                    encoder_group=group,
                )
                if candidate.num_ranks <= problem.num_gpus and allowed(problem, candidate):
                    yield candidate
