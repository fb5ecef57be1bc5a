import pytest

from megatron_mosaic.schedule.graph import (
    Stage,
    hosted_stages,
    module_order,
    needs_backward,
    stage_distances,
    upstream,
)
from tests.schedule.plans import place, plan_of

CHAIN = (("vision", "adapter"), ("adapter", "language"), ("audio", "language"))


def chain(**trainable):
    names = "audio", "vision", "adapter", "language"
    placements = [place(name, 0, trainable=trainable.get(name)) for name in names]
    return plan_of("colocated", *placements, edges=CHAIN, num_microbatches=1)


def test_module_order_puts_feeders_first():
    order = module_order(chain())

    assert order.index("vision") < order.index("adapter") < order.index("language")
    assert order.index("audio") < order.index("language")


def test_stage_distances_take_the_longest_path():
    plan = plan_of(
        "1f1b",
        place("vision", 0, 1, pp=2),
        place("audio", 2),
        place("language", 3, 4, pp=2),
        edges=(("vision", "language"), ("audio", "vision"), ("audio", "language")),
        num_microbatches=1,
    )

    assert stage_distances(plan) == {
        Stage("language", 1): 0,
        Stage("language", 0): 1,
        Stage("vision", 1): 2,
        Stage("vision", 0): 3,
        Stage("audio", 0): 4,  # through vision, not straight to language
    }


def test_upstream_follows_chains():
    assert upstream(chain(), "language") == {"vision", "adapter", "audio"}
    assert upstream(chain(), "vision") == frozenset()


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        ({}, {"audio", "vision", "adapter", "language"}),
        ({"vision": (), "audio": ()}, {"adapter", "language"}),
        ({"adapter": (), "audio": ()}, {"vision", "adapter", "language"}),
        ({"vision": (), "adapter": (), "language": ()}, {"audio", "language"}),
        (
            {"vision": ("projector",), "audio": (), "language": ()},
            {"vision", "adapter", "language"},
        ),
    ],
)
def test_needs_backward_if_something_at_or_upstream_is_trainable(trainable, expected):
    plan = chain(**trainable)

    assert {name for name in plan.modules if needs_backward(plan, name)} == expected


def test_hosted_stages_names_the_stage_of_every_module_on_a_rank():
    plan = plan_of(
        "colocated", place("vision", 3, 1, dp=2), place("language", 0, 1, pp=2), num_microbatches=1
    )

    assert hosted_stages(plan, 1) == (Stage("language", 1), Stage("vision", 0))
    assert hosted_stages(plan, 2) == ()
