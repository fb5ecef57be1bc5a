"""Why a plan is the best: its numbers beside others', and what made the difference."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_mosaic.cost.costs import StepEstimate
from megatron_mosaic.cost.sizes import ParallelSizes
from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.planner.balance_text import balance_sentences
from megatron_mosaic.planner.candidate import Candidate
from megatron_mosaic.planner.estimate import Estimate
from megatron_mosaic.planner.multiplexing_text import multiplexing_note, multiplexing_sentences
from megatron_mosaic.planner.planner import Answer, as_estimates, inputs_of
from megatron_mosaic.planner.prediction import prediction
from megatron_mosaic.planner.sensitivity import Case, sensitivity
from megatron_mosaic.planner.simulated import Simulated
from megatron_mosaic.schedule.graph import Stage

_TERMS = {
    "compute_s": "compute",
    "imbalance_s": "waiting for ranks with more to do in the same task",
    "communication_s": "exposed communication",
    "bubble_s": "bubble",
    "sync_s": "synchronisation of gradients and weights",
    "optimizer_s": "optimizer",
}
_HOSTS = {
    "language": "all ranks of language",
    "first_stage": "the first stage of language",
    "replicated": "the first stage of language, alike on its context-parallel ranks",
    "apart": "ranks of its own",
    "together": "ranks apart, together with the other encoders",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """What the planner says about its answer.

    Args:
        answer: The answer.
        sentences: What made the difference.
        cases: The choice, the next one and the baseline, with constants moved.
    """

    answer: Answer
    sentences: tuple[str, ...]
    cases: tuple[Case, ...]


def explain(answer: Answer) -> Explanation:
    """Explains an answer."""
    return Explanation(
        answer=answer,
        sentences=tuple(_sentences(answer)),
        cases=sensitivity(answer.problem, as_estimates(answer)),
    )


def sizes_text(sizes: ParallelSizes, layers_per_stage: tuple[int, ...]) -> str:
    """Sizes of a module in a few words; sizes of 1 are left out."""
    words = [
        f"{name}{size}"
        for name, size in zip(("tp", "cp", "dp", "pp"), _grid(sizes), strict=True)
        if size > 1
    ]
    words += [f"vp{sizes.chunks}"] if sizes.chunks > 1 else []
    words += [f"ep{sizes.ep}"] if sizes.ep > 1 else []
    words += [f"etp{sizes.etp}"] if sizes.etp != sizes.tp else []
    words += [] if sizes.items == "in_order" else [f"items {sizes.items}"]
    words += ["sp"] if sizes.sequence_parallel else []
    words += [f"recompute={sizes.recompute}"] if sizes.recompute else []
    if len(set(layers_per_stage)) > 1:
        words.append(f"layers {runs_text(layers_per_stage)}")
    return " ".join(words) or "one rank"


def runs_text(counts: tuple[int, ...]) -> str:
    """Numbers with repeats folded, such as ``5,6x14,5``."""
    runs: list[list[int]] = []
    for count in counts:
        if runs and runs[-1][0] == count:
            runs[-1][1] += 1
        else:
            runs.append([count, 1])
    return ",".join(f"{count}x{times}" if times > 1 else f"{count}" for count, times in runs)


def modules_text(entry: Simulated) -> dict[str, str]:
    """Sizes and hosts of every module in words."""
    candidate, split = entry.candidate, entry.layers_per_stage
    texts = {
        encoder.name: f"{sizes_text(encoder.sizes, split[encoder.name])} on {_HOSTS[encoder.host]}"
        for encoder in candidate.encoders
    }
    attention = entry.plan.language.attention
    tokens = f" tokens {attention.tokens}" if attention and candidate.language.cp > 1 else ""
    texts[LANGUAGE] = sizes_text(candidate.language, split[LANGUAGE]) + tokens
    quotas = dict(candidate.quotas)
    return {n: f"{text} sms {quotas[n]}" if n in quotas else text for n, text in texts.items()}


def schedule_text(candidate: Candidate) -> str:
    """What is special about the order of a candidate's tasks; empty if nothing is."""
    texts = ["interleaved stages"] if candidate.language.chunks > 1 else []
    shared = [encoder for encoder in candidate.encoders if encoder.shares]
    if candidate.kind == "concurrent":
        texts.append("modules that run at the same time")
    if candidate.kind == "bubble_fill" and shared:
        is_cut = any(encoder.sizes.chunks > 1 for encoder in shared)
        cut = ", cut into layer chunks," if is_cut else ""
        texts.append(f"encoder tasks{cut} in the waits of its pipeline")
    texts += ["frozen encoders a step ahead"] if candidate.ahead else []
    return f" with {' and '.join(texts)}" if texts else ""


def _grid(sizes: ParallelSizes) -> tuple[int, ...]:
    return sizes.tp, sizes.cp, sizes.dp, sizes.pp


def _sentences(answer: Answer) -> list[str]:
    choice, baseline = answer.choice, answer.baseline
    sentences = []
    if not answer.problem.encoders:
        sentences.append("There is one module, so every layout is homogeneous.")
    elif baseline is None:
        sentences.append(
            f"{_step(choice)} a step; no homogeneous layout fits, or has what is pinned."
        )
    elif baseline.candidate == choice.candidate:
        sentences.append(_homogeneous_wins(answer))
    else:
        sentences.append(_difference(choice, baseline))
        sentences.append(_balance(choice, baseline))
    sentences += multiplexing_sentences(answer)
    sentences += balance_sentences(answer)
    sentences.append(_memory(choice.step, limit_bytes=answer.problem.memory_bytes))
    return sentences


def _homogeneous_wins(answer: Answer) -> str:
    rest = [e for e in answer.best if not e.candidate.is_homogeneous]
    if not rest:
        return "The homogeneous layout is the fastest; no other kind of placement came close."
    nearest, seconds = rest[0], rest[0].step_s - answer.choice.step_s
    terms = _largest_changes(nearest, answer.choice)
    reason = f", mostly by {terms[0][0]}" if terms else ""
    return (
        f"The homogeneous layout is the fastest; the best {nearest.candidate.placement} "
        f"one takes {_ms(seconds)} longer{reason}."
    )


def _difference(choice: Simulated, baseline: Simulated) -> str:
    """Which terms make the choice faster, and which it pays for that."""
    changes = _largest_changes(baseline, choice)
    saved = [f"{_ms(s)} of {term}" for term, s in changes if s > 0]
    paid = [f"{_ms(-s)} of {term}" for term, s in changes if s < 0]
    gain = baseline.step_s / choice.step_s - 1
    text = (
        f"{_step(choice)} a step, the best homogeneous one {_ms(baseline.step_s)} "
        f"({gain:.1%} longer): it saves "
        f"{' and '.join(saved) or 'nothing in a single term'}"
    )
    return f"{text}, and pays {' and '.join(paid)}." if paid else f"{text}."


def _step(entry: Simulated) -> str:
    candidate = entry.candidate
    text = f"The {candidate.placement} layout{schedule_text(candidate)}"
    return f"{text} takes {_ms(entry.step_s)}"


def _largest_changes(before: Simulated, after: Simulated) -> list[tuple[str, float]]:
    """Terms that change by at least a hundredth of the step, the largest first."""
    changes = [
        (words, getattr(before.step.breakdown, term) - getattr(after.step.breakdown, term))
        for term, words in _TERMS.items()
    ]
    least_s = after.step_s / 100
    return sorted((c for c in changes if abs(c[1]) >= least_s), key=lambda c: -abs(c[1]))[:3]


def _balance(choice: Simulated, baseline: Simulated) -> str:
    """What encoders do to the pipeline in both layouts."""
    parts = []
    for name, text in modules_text(choice).items():
        before = modules_text(baseline)[name]
        if text != before:
            parts.append(f"{name} has {text} (homogeneous: {before})")
    changes = "; ".join(parts) or "all modules have the same sizes in both"
    loads = f"{_load(choice.estimate)}; in the homogeneous layout {_load(baseline.estimate)}"
    return f"{changes[0].upper()}{changes[1:]}. {loads[0].upper()}{loads[1:]}."


def _load(estimate: Estimate) -> str:
    """What encoders do on the ranks that they have, in words."""
    apart = estimate.candidate.num_ranks - estimate.candidate.language.num_ranks
    texts = [f"encoders have {apart} ranks to themselves"] if apart else []
    share = encoder_share(estimate)
    if share:
        texts.append(f"encoders are {share:.0%} of the work of a rank that they share")
    return " and ".join(texts)


def encoder_share(estimate: Estimate) -> float:
    """Largest share of a rank's work that encoders have, of ranks of the language model."""
    busy = [s.forward_s + s.backward_s for s in estimate.modules[LANGUAGE].stages]
    encoders = [0.0] * len(busy)
    for hosted in estimate.modules.values():
        if hosted.choice is None or not hosted.choice.shares:
            continue
        for stage in range(len(busy)) if hosted.choice.host == "language" else (0,):
            encoders[stage] += hosted.busy_s / hosted.group
    return max(own / (own + rest) for own, rest in zip(encoders, busy, strict=True))


def _memory(step: StepEstimate, *, limit_bytes: float) -> str:
    hosted, terms = max(step.memory.items(), key=lambda item: sum(item[1].values()))
    largest = sorted(terms, key=lambda term: -terms[term])[:2]
    shown = " and ".join(f"{gib(terms[term])} of {term}" for term in largest)
    return (
        f"The fullest rank ({hosted_text(hosted)}) holds {gib(sum(terms.values()))} of "
        f"{gib(limit_bytes)}, most of it {shown}."
    )


def hosted_text(hosted: tuple[Stage, ...]) -> str:
    """Stages of a rank in words."""
    numbers: dict[str, list[str]] = {}
    for module, stage in hosted:
        numbers.setdefault(module, []).append(f"{stage}")
    return " + ".join(
        f"{module}.{','.join(own) if len(own) < 4 else f'{own[0]},{own[1]}..{own[-1]}'}"
        for module, own in numbers.items()
    )


def gib(num_bytes: float) -> str:
    """Bytes for people."""
    return f"{num_bytes / 2**30:.1f} GiB"


def _ms(seconds: float) -> str:
    return f"{seconds:.2f} s" if abs(seconds) >= 1 else f"{seconds * 1e3:.1f} ms"


def robustness(explanation: Explanation) -> list[str]:
    """What moved constants do to the choice, in sentences."""
    names = ["the choice", "the next one", "the baseline"]
    if len(explanation.answer.best) < 2:
        names = ["the choice", "the baseline"]
    texts = []
    for case in explanation.cases:
        moved = f"{case.constant} {case.factor - 1:+.0%}"
        if case.fastest and case.loss > 0.001:
            texts.append(f"{moved}: {names[case.fastest]} would be {case.loss:.1%} faster")
        elif not case.fits:
            texts.append(f"{moved}: the choice would not fit")
    held = len(explanation.cases) - len(texts)
    return [
        f"The choice is the same in {held} of {len(explanation.cases)} cases of constants 20 % off",
        *texts,
    ]


def as_document(explanation: Explanation) -> dict[str, Any]:
    """An explanation for machines."""
    answer = explanation.answer
    problem, found = answer.problem, answer.found
    return {
        "model": problem.model.name,
        "cluster": problem.cluster.name,
        "num_gpus": problem.num_gpus,
        "global_batch_size": problem.global_batch_size,
        "inputs": inputs_of(problem),
        "best": [_entry(entry) for entry in answer.best],
        "baseline": None if answer.baseline is None else _entry(answer.baseline),
        "search": {
            "bound_s": found.bound_s,
            "gap": found.gap,
            "language_layouts": found.num_language,
            "estimates": found.num_estimates,
        },
        "multiplexing": multiplexing_note(answer),
        "why": list(explanation.sentences),
        "sensitivity": [
            {
                "constant": case.constant,
                "factor": case.factor,
                "steps_s": list(case.steps_s),
                "choice_holds": case.fastest == 0 or case.loss <= 0.001,
                "fits": case.fits,
            }
            for case in explanation.cases
        ],
    }


def _balance_keys(entry: Simulated, name: str) -> dict[str, Any]:
    """How a module's loads are evened out, where the plan says something of it."""
    placement = entry.plan.modules[name]
    keys: dict[str, Any] = {}
    if placement.attention is not None:
        keys["attention"] = asdict(placement.attention)
    if placement.items != "in_order":
        keys["items"] = placement.items
    return keys


def _entry(entry: Simulated) -> dict[str, Any]:
    estimate = entry.estimate
    candidate, quotas = entry.candidate, dict(entry.candidate.quotas)
    sizes: Mapping[str, tuple[ParallelSizes, str | None]] = {
        **{e.name: (e.sizes, e.host) for e in candidate.encoders},
        LANGUAGE: (candidate.language, None),
    }
    return {
        **prediction(entry),
        "closed_form_step_s": estimate.step_s,
        "is_simulated": entry.is_simulated,
        "micro_batch_size": candidate.micro_batch_size,
        "num_microbatches": estimate.num_microbatches,
        "schedule": {
            "kind": candidate.kind,
            "encoder_group": candidate.encoder_group,
            "ahead": candidate.ahead,
            "max_live": entry.plan.schedule.max_live,
        },
        "num_ranks": candidate.num_ranks,
        "model_flops": entry.step.flops,
        "modules": {
            name: {
                "host": host,
                "tensor_model_parallel_size": its.tp,
                "context_parallel_size": its.cp,
                "data_parallel_size": its.dp,
                "pipeline_model_parallel_size": its.pp,
                "virtual_pipeline_model_parallel_size": its.chunks,
                "expert_model_parallel_size": its.ep,
                "expert_tensor_parallel_size": its.etp,
                "sequence_parallel": its.sequence_parallel,
                "recompute": its.recompute,
                **_balance_keys(entry, name),
                **({"share": {"sms": quotas[name]}} if name in quotas else {}),
                "layers_per_stage": list(entry.layers_per_stage[name]),
            }
            for name, (its, host) in sizes.items()
        },
        "memory_bytes": {
            hosted_text(hosted): {term: round(held) for term, held in terms.items()}
            for hosted, terms in entry.step.memory.items()
        },
    }
