import random
from itertools import combinations
from math import inf

from benchmarks.frozen_partition import CASES, compare
from megatron_mosaic.cost.costs import ModuleCosts, PartCosts, PartRun
from megatron_mosaic.cost.sizes import ParallelSizes
from megatron_mosaic.planner.partition import (
    Chain,
    Load,
    Room,
    chain_of,
    split_chains,
    split_layers,
)


def one_f_one_b_room(num_bytes, *, num_stages, num_microbatches):
    """A stage of 1F1B holds as many microbatches as there are stages from it to the end."""
    live = [min(num_microbatches, num_stages - stage) for stage in range(num_stages)]
    return Room(num_bytes=num_bytes, live_tasks=live)


def chain(*times, first=0.0, last=0.0):
    return Chain(input=Load(first), layers=tuple(map(Load, times)), output=Load(last))


def exhaustive(chain, num_stages, room=None):
    """Time of the slowest stage of the best of all splits; inf if none fits."""
    num_layers = len(chain.layers)
    best = inf
    for cuts in combinations(range(1, num_layers), num_stages - 1):
        ends = [0, *cuts, num_layers]
        slowest = 0.0
        for stage in range(num_stages):
            parts = list(chain.layers[ends[stage] : ends[stage + 1]])
            parts += [chain.input] if stage == 0 else []
            parts += [chain.output] if stage == num_stages - 1 else []
            time_s, fixed, live = (sum(column) for column in zip(*parts, strict=True))
            slowest = max(slowest, time_s)
            if room and fixed + room.live_tasks[stage] * live > room.num_bytes:
                slowest = inf
        best = min(best, slowest)
    return best


def random_load(draw):
    return Load(draw.randint(0, 20), draw.randint(0, 5), draw.randint(0, 3))


def random_chain(draw, most=9):
    layers = tuple(random_load(draw) for _ in range(draw.randint(1, most)))
    return Chain(input=random_load(draw), layers=layers, output=random_load(draw))


def test_split_equals_exhaustive_optimum_on_1000_random_profiles():
    draw = random.Random(4)
    for _ in range(1000):
        profile = random_chain(draw)
        num_stages = draw.randint(1, len(profile.layers))

        split = split_layers(profile, num_stages=num_stages)

        assert split.slowest_s == exhaustive(profile, num_stages)
        assert sum(split.layers_per_stage) == len(profile.layers)
        assert min(split.layers_per_stage) >= 1


def test_split_within_memory_equals_exhaustive_optimum_on_1000_random_profiles():
    draw = random.Random(5)
    refused = 0
    for _ in range(1000):
        profile = random_chain(draw)
        num_stages = draw.randint(1, len(profile.layers))
        room = one_f_one_b_room(
            draw.randint(5, 40), num_stages=num_stages, num_microbatches=draw.randint(1, 6)
        )

        split = split_layers(profile, num_stages=num_stages, room=room)

        refused += split is None
        assert (split.slowest_s if split else inf) == exhaustive(profile, num_stages, room)
    assert 100 < refused < 900


def test_split_of_two_chains_equals_exhaustive_optimum():
    draw = random.Random(6)
    for _ in range(200):
        encoder, language = random_chain(draw, most=5), random_chain(draw, most=5)
        num_stages = draw.randint(2, len(encoder.layers) + len(language.layers))
        num_bytes, num_microbatches = draw.randint(10, 60), draw.randint(1, 6)

        splits = split_chains(
            [encoder, language],
            num_stages=num_stages,
            memory_bytes=num_bytes,
            num_microbatches=num_microbatches,
        )

        live = [min(num_microbatches, num_stages - stage) for stage in range(num_stages)]
        expected = min(
            max(
                exhaustive(encoder, n, Room(num_bytes=num_bytes, live_tasks=live[:n])),
                exhaustive(
                    language, num_stages - n, Room(num_bytes=num_bytes, live_tasks=live[n:])
                ),
            )
            for n in range(1, num_stages)
            if n <= len(encoder.layers) and num_stages - n <= len(language.layers)
        )
        assert (max(split.slowest_s for split in splits) if splits else inf) == expected


def test_equal_layers_are_split_evenly():
    # 126 layers on 64 stages: 62 with two layers and two with one.
    split = split_layers(chain(*[1.0] * 126), num_stages=64)

    assert split.slowest_s == 2.0
    assert sum(split.layers_per_stage) == 126


def test_input_and_output_take_layers_from_their_stages():
    # Twelve layers of 1 and an output of 2 on three stages: 5 + 5 + (2 + 2).
    split = split_layers(chain(*[1.0] * 12, last=2.0), num_stages=3)

    assert split == ((5, 5, 2), 5.0)


def test_room_moves_layers_to_stages_with_fewer_live_tasks():
    # Two bytes per task and layer; the first of two stages has two live tasks, the second one.
    # Of 12 bytes the first takes three layers (12 bytes), the second up to six.
    layers = tuple(Load(1.0, 0.0, 2.0) for _ in range(8))
    room = one_f_one_b_room(12.0, num_stages=2, num_microbatches=8)

    split = split_layers(Chain(layers=layers), num_stages=2, room=room)

    assert split == ((3, 5), 5.0)


def test_nothing_fits_a_room_that_is_too_small():
    room = one_f_one_b_room(3.0, num_stages=2, num_microbatches=8)

    assert split_layers(Chain(layers=(Load(1.0, 4.0),) * 4), num_stages=2, room=room) is None


PART = PartCosts(
    forward_s=2.0, input_gradient_s=3.0, weight_gradient_s=5.0, recompute_s=1.0, parameters=1.0
)
FROZEN = PartCosts(
    forward_s=2.0,
    input_gradient_s=3.0,
    weight_gradient_s=5.0,
    recompute_s=1.0,
    parameters=1.0,
    trainable=0.0,
)


def test_chain_of_frozen_encoder_with_projector_has_backward_only_in_the_projector():
    costs = ModuleCosts(
        name="vision",
        sizes=ParallelSizes(),
        input=FROZEN,
        layers=(PartRun(2, FROZEN),),
        output=PART,
    )

    # The projector: 2 forward, 1 + 3 + 5 backward.
    assert chain_of(costs, trainable_upstream=False) == ((2.0, 2.0), 2.0, 11.0)
    # Three times the forward pass, and once more what is computed again.
    assert chain_of(costs, trainable_upstream=False, frozen_aware=False) == ((7.0, 7.0), 7.0, 7.0)


def test_aware_split_gives_frozen_layers_fewer_stages():
    # Four frozen layers of 1 (forward alone) and four that train, of 3: 4 + 3 + 3 + 6 at best.
    aware = split_layers(chain(1, 1, 1, 1, 3, 3, 3, 3), num_stages=5)
    unaware = split_layers(chain(3, 3, 3, 3, 3, 3, 3, 3), num_stages=5)

    assert aware == ((4, 1, 1, 1, 1), 4.0)
    assert unaware.layers_per_stage == (1, 2, 2, 2, 1)  # its fourth stage really takes 3 + 3


def test_aware_splits_are_faster_on_all_published_stage_times():
    # Cornstarch, arXiv 2503.11367, table 2, with the stage counts that the benchmark assumes.
    gains = {row["case"]: row for row in map(compare, CASES)}

    assert set(gains) == {"SSS", "MMS", "MMM", "LLL"}
    for row in gains.values():
        assert row["gain_with_published_stages"] > 1
        assert row["gain_of_own_split"] > 1
