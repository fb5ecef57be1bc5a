from dataclasses import replace

import pytest

from megatron_mosaic.planner.estimate import Estimator
from megatron_mosaic.planner.legal_sizes import language_sizes
from megatron_mosaic.planner.placements import every_candidate
from megatron_mosaic.planner.search import search
from tests.planner.problems import cost_model, encoder, language, model, problem


def exhaustive(asked):
    """Fastest of all candidates that fit, and how many there are; None if none fits."""
    estimator = Estimator(asked, cost_model(asked))
    best, count = None, 0
    micro = asked.pins.micro_batch_size
    for micro_batch_size in (micro,) if micro else asked.space.micro_batch_sizes:
        for sizes in language_sizes(asked, micro_batch_size=micro_batch_size):
            for candidate in every_candidate(asked, sizes, micro_batch_size):
                count += 1
                estimate = estimator.estimate(candidate)
                if estimate and (best is None or estimate.step_s < best.step_s):
                    best = estimate
    return best, count


ENCODER = encoder("vision")
BIG_ENCODER = encoder("vision", hidden=2048, layers=12, trainable=None)
SMALL_ENCODER = encoder("audio", hidden=256, heads=4, layers=4, tokens=196, trainable=None)
AUDIO = encoder("audio", hidden=512, heads=8, layers=4, tokens=1500, trainable=())

SPACES = {
    "one frozen encoder": problem(model(ENCODER), 4, 16),
    "little memory": problem(model(ENCODER), 4, 16, memory_gib=12.0),
    "large encoder": problem(model(BIG_ENCODER), 8, 8, micro_batch_sizes=(1, 2)),
    "large encoder, little memory": problem(
        model(BIG_ENCODER), 4, 16, memory_gib=9.0, micro_batch_sizes=(1,)
    ),
    "two encoders": problem(
        model(ENCODER, AUDIO), 4, 8, micro_batch_sizes=(1,), recompute=(None, "full")
    ),
    "two encoders, uneven": problem(
        model(BIG_ENCODER, AUDIO), 3, 12, micro_batch_sizes=(1, 2), recompute=(None,)
    ),
    "three trained encoders": problem(
        model(BIG_ENCODER, *(replace(SMALL_ENCODER, name=name) for name in ("audio", "depth"))),
        4,
        8,
        micro_batch_sizes=(2,),
        recompute=(None,),
        max_encoder_stages=2,
    ),
    "experts": problem(model(language=language(experts=8)), 8, 16, micro_batch_sizes=(1, 2)),
    "language alone": problem(model(), 8, 32, memory_gib=10.0),
    "frozen language": problem(model(ENCODER, language=language(trainable=())), 4, 16),
}


@pytest.mark.parametrize("name", SPACES)
def test_search_returns_the_exhaustive_optimum(name):
    asked = SPACES[name]
    best, count = exhaustive(asked)
    assert count <= 20_000

    found = search(asked, cost_model(asked))

    assert found.best[0].step_s == pytest.approx(best.step_s, rel=1e-12)
    assert found.bound_s == found.best[0].step_s
    print(name, count, found.num_estimates, found.best[0].candidate.placement)
