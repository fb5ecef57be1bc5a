"""Why modules of a plan run at the same time, or why they do not, in a sentence."""

from typing import Any

from megatron_mosaic.planner.multiplexing import LEAST_GAIN, may_share
from megatron_mosaic.planner.planner import Answer
from megatron_mosaic.planner.quotas import sharing_modules
from megatron_mosaic.planner.simulated import Simulated


def multiplexing_sentences(answer: Answer) -> list[str]:
    """Says what came of modules that run at the same time; nothing if there is one module."""
    problem, found = answer.problem, answer.multiplexing
    if not may_share(problem):
        return []
    left_out = f"; {found.obstacle}" if found.obstacle else ""
    if found.best is None or found.gain is None:
        return [
            f"Modules run one at a time: no layout could gain {LEAST_GAIN:.0%} if they "
            f"shared its GPUs{left_out}."
        ]
    split = quotas_text(found.best, num_sms=problem.cluster.gpu.num_sms)
    if found.pays:
        than = (
            "the best plan that runs one module at a time"
            if problem.pins.kind is None
            else "such a layout that runs one module at a time"
        )
        change = f"{abs(found.gain):.1%} {'faster' if found.gain >= 0 else 'slower'}"
        return [f"Modules run at the same time, {split}: {change} than {than}."]
    return [
        f"Modules run one at a time: at the same time, {split}, they would "
        f"{_change(found.gain)}, and less than {LEAST_GAIN:.0%} is not worth it{left_out}."
    ]


def _change(gain: float) -> str:
    return f"gain {gain:.1%}" if gain >= 0 else f"lose {-gain:.1%}"


def quotas_text(entry: Simulated, *, num_sms: int) -> str:
    """Quotas of the modules that share GPUs, such as ``vision on 32 and language on 100 SMs``."""
    quotas = {name: str(sms) for name, sms in entry.candidate.quotas}
    texts = [
        f"{name} on {quotas.get(name, f'up to {num_sms}')}" for name in sharing_modules(entry.plan)
    ]
    return f"{', '.join(texts[:-1])} and {texts[-1]} of {num_sms} SMs"


def multiplexing_note(answer: Answer) -> dict[str, Any]:
    """What came of it, for machines."""
    found = answer.multiplexing
    best = found.best
    return {
        "pays": found.pays,
        "gain": found.gain,
        "least_gain": LEAST_GAIN,
        "examined": found.num_examined,
        "obstacle": found.obstacle or None,
        "best": None
        if best is None
        else {
            "step_s": best.step_s,
            "encoder_group": best.candidate.encoder_group,
            "ahead": best.candidate.ahead,
            "sms": dict(best.candidate.quotas),
        },
    }
