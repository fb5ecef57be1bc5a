"""Every plan trains like one process: losses, gradients of every tensor, and weights.

The reference is stock Megatron in one process, without anything of Mosaic but the initial
weights. A plan file of ``tests/plans`` names the options of its run in its first line, and in
the second one the training script, if it is another than ``vlm_script``.
"""

from itertools import pairwise
from pathlib import Path

import pytest

from megatron_mosaic.comm.replay import ReplayError, replay
from tests.parity.compare import whole
from tests.parity.record import OPTIMIZERS, record_plan
from tests.parity.training import TIMEOUT_S, compared, options_of, reference, trained
from tests.ranks import run_ranks

PLANS = sorted((Path(__file__).parent.parent / "plans").glob("*.yaml"))

# Adam without sharded states steps each weight by itself, as SGD does: a layout can spoil no more
# than gradients and their norm, and SGD's weights show those better. These plans differ in what the
# optimizer is given, or stand for the others.
ALSO_WITH_ADAM = (
    "colocated_v2_l2pp2",
    "disjoint_v2_lpp2",
    "frozen_vision",
    "idle_rank",
    "one_rank",
    "projector_only",
    "tied_embeddings",
)


def _optimizers_of(plan: Path) -> tuple[str, ...]:
    # Megatron shards the states of Adam only.
    if "--use-distributed-optimizer" in options_of(plan):
        return ("adam",)
    return tuple(OPTIMIZERS) if plan.stem in ALSO_WITH_ADAM else ("sgd",)


def _cases() -> list:
    return [
        pytest.param(plan, optimizer, id=f"{plan.stem}-{optimizer}")
        for plan in PLANS
        for optimizer in _optimizers_of(plan)
    ]


@pytest.mark.parametrize(("plan", "optimizer"), _cases())
def test_plan_trains_like_one_process(plan, optimizer, record_property):
    records = trained(plan, optimizer)
    result = compared(records, plan, optimizer)

    record_property("worst_gradient", result.worst_gradient)
    record_property("worst_weight", result.worst_weight)
    record_property("negligible", result.negligible)
    assert not result.failures, "\n".join(result.failures[:20])
    # The order of all communication also completes without buffers, one queue a communicator.
    replay({rank: record.communication for rank, record in enumerate(records)})


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ("double_vision_gradient", "disjoint_v1_l2"),
        ("swap_replicas", "disjoint_v1_l2"),
        ("skip_boundary_gradient", "disjoint_v1_l2"),
        ("unmark_recomputed", "recompute_full_frozen_embedding"),
        ("unmark_recomputed", "recompute_vision_later_layers"),
        ("scale_auxiliary_losses_by_the_encoder", "moe_ep2_pp2"),
    ],
)
def test_planted_fault_is_seen(fault, name):
    plan = Path(__file__).parent.parent / "plans" / f"{name}.yaml"
    result = compared(trained(plan, "sgd", (fault,)), plan, "sgd")

    assert any(line.startswith("gradient ") for line in result.failures)


def test_replicas_of_an_expert_that_train_apart_are_seen():
    plan = Path(__file__).parent.parent / "plans" / "moe_frozen_vision.yaml"

    with pytest.raises(AssertionError, match="replicas differ"):
        compared(trained(plan, "adam", ("keep_expert_gradients_apart",)), plan, "adam")


def test_one_swapped_pair_of_operations_makes_the_replay_fail():
    plan = Path(__file__).parent.parent / "plans" / "colocated_v2_l2pp2.yaml"
    records = {rank: list(record.communication) for rank, record in enumerate(trained(plan, "sgd"))}
    _swap_two_issues(records[1])

    with pytest.raises(ReplayError):
        replay(records)


def _swap_two_issues(entries: list) -> None:
    """Exchanges the first two different operations on one communicator, issued back to back."""
    issues = [entry for entry in entries if hasattr(entry, "communicator")]
    for first, second in pairwise(issues):
        alike = (first.operation, first.num_elements) == (second.operation, second.num_elements)
        if first.communicator == second.communicator and not alike:
            a, b = entries.index(first), entries.index(second)
            entries[a], entries[b] = second, first
            return
    raise AssertionError("no two operations to swap")


@pytest.mark.parametrize("name", ["colocated_v2_l2pp2", "virtual_cp2"])
def test_bf16_stays_as_near_to_one_process_as_bf16_does_to_fp32(name):
    plan = Path(__file__).parent.parent / "plans" / f"{name}.yaml"
    options = ("--images", "ragged")
    arguments = [*OPTIMIZERS["adam"], *options, "--bf16", "--use-distributed-optimizer"]
    records = run_ranks(record_plan, 4, str(plan), arguments, init=False, timeout_s=TIMEOUT_S)

    run, fp32 = whole(records), reference("adam", options)
    one = reference("adam", (*options, "--bf16"))
    for step in range(4):
        own, alone, exact = (each.losses[step]["lm loss"] for each in (run, one, fp32))
        # The sum of the losses over about 40 tokens; both runs round to 8 bits.
        assert abs(own[0] - exact[0]) <= max(3 * abs(alone[0] - exact[0]), 2e-3 * exact[0])
        assert own[1] == exact[1]
