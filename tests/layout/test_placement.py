import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.errors import LayoutError
from megatron_mosaic.layout.placement import AXES, EXPERT_AXES, ModulePlacement


@st.composite
def placements(draw):
    tp, cp, dp, pp = (draw(st.integers(1, 3)) for _ in AXES)
    ranks = draw(st.permutations(range(tp * cp * dp * pp + 2)))[: tp * cp * dp * pp]
    return ModulePlacement(
        name="language",
        ranks=tuple(ranks),
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        data_parallel_size=dp,
        pipeline_model_parallel_size=pp,
    )


@st.composite
def expert_placements(draw):
    placement = draw(placements())
    shape = placement.shape
    stage = shape.tp * shape.cp * shape.dp
    sizes = [size for size in range(1, stage + 1) if stage % size == 0]
    expt_tp = draw(st.sampled_from(sizes))
    ep = draw(st.sampled_from([size for size in sizes if stage // expt_tp % size == 0]))
    return dataclasses.replace(
        placement, expert_model_parallel_size=ep, expert_tensor_parallel_size=expt_tp
    )


def language(**changes):
    # Every second rank of a node: tp is fastest, then dp, then pp.
    sizes = {
        "tensor_model_parallel_size": 2,
        "data_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
    }
    ranks = (0, 2, 4, 6, 8, 10, 12, 14)
    return ModulePlacement(**{"name": "language", "ranks": ranks, **sizes, **changes})


def test_placement_orders_ranks_tp_dp_pp():
    assert language().coordinates(10) == (1, 0, 0, 1)


def test_placement_groups_tensor_parallel_ranks():
    assert language().groups("tp") == [(0, 2), (4, 6), (8, 10), (12, 14)]


def test_placement_groups_data_parallel_ranks():
    assert language().groups("dp") == [(0, 4), (2, 6), (8, 12), (10, 14)]


def test_placement_groups_pipeline_ranks():
    assert language().groups("pp") == [(0, 8), (2, 10), (4, 12), (6, 14)]


def test_placement_groups_model_parallel_ranks():
    assert language().groups("tp", "pp") == [(0, 2, 8, 10), (4, 6, 12, 14)]


def test_placement_names_ranks_of_stage():
    assert language().stage_ranks(1) == (8, 10, 12, 14)


@given(placements())
def test_rank_at_inverts_coordinates(placement):
    for rank in placement.ranks:
        assert placement.rank_at(**placement.coordinates(rank)._asdict()) == rank


@given(placements(), st.sets(st.sampled_from(AXES)))
def test_groups_hold_every_rank_once(placement, axes):
    groups = placement.groups(*axes)

    assert sorted(rank for group in groups for rank in group) == sorted(placement.ranks)


@given(placements(), st.sets(st.sampled_from(AXES)))
def test_groups_differ_only_along_their_axes(placement, axes):
    for group in placement.groups(*axes):
        for axis in set(AXES) - axes:
            assert len({getattr(placement.coordinates(rank), axis) for rank in group}) == 1


def test_experts_have_a_grid_of_their_own_on_each_stage():
    # Stage 0 is ranks 0 2 4 6, tp fastest; its experts are split in two, each kept by two ranks.
    placement = language(expert_model_parallel_size=2, expert_tensor_parallel_size=1)

    assert placement.expert_shape == (1, 2, 2, 2)
    assert placement.expert_groups("ep") == [(0, 2), (4, 6), (8, 10), (12, 14)]
    assert placement.expert_groups("expt_dp") == [(0, 4), (2, 6), (8, 12), (10, 14)]
    assert placement.expert_coordinates(14) == (0, 1, 1, 1)


def test_an_expert_is_split_as_a_dense_layer_unless_the_plan_says_otherwise():
    placement = language(expert_model_parallel_size=2)

    assert placement.expert_groups("expt_tp") == placement.groups("tp")
    assert placement.expert_groups("ep") == [(0, 4), (2, 6), (8, 12), (10, 14)]


def test_expert_tensor_parallel_size_may_be_written_out():
    assert language(expert_tensor_parallel_size=2) == language()


def test_ranks_that_share_experts_run_each_task_together():
    # Pairs of tensor-parallel ranks, joined into stages by experts split in four.
    assert language().task_groups() == [(0, 2), (4, 6), (8, 10), (12, 14)]
    placement = language(expert_model_parallel_size=4, expert_tensor_parallel_size=1)
    assert placement.task_groups() == [(0, 2, 4, 6), (8, 10, 12, 14)]


@given(expert_placements(), st.sets(st.sampled_from(EXPERT_AXES)))
def test_expert_groups_differ_only_along_their_axes(placement, axes):
    groups = placement.expert_groups(*axes)

    assert sorted(rank for group in groups for rank in group) == sorted(placement.ranks)
    for group in groups:
        for axis in set(EXPERT_AXES) - axes:
            assert len({getattr(placement.expert_coordinates(rank), axis) for rank in group}) == 1


@given(expert_placements())
def test_task_groups_hold_the_groups_with_collectives_inside_a_task(placement):
    task_groups = [set(group) for group in placement.task_groups()]

    assert sorted(rank for group in task_groups for rank in group) == sorted(placement.ranks)
    for group in (*placement.groups("tp", "cp"), *placement.expert_groups("expt_tp", "ep")):
        assert any(set(group) <= members for members in task_groups)


def test_placement_refuses_coordinates_of_other_rank():
    with pytest.raises(LayoutError, match=r"modules\.language: rank=1 must be one of \[0, 2, 4"):
        language().coordinates(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": ()}, r"ranks=\[\] must name at least one rank; "),
        ({"ranks": (-1, *range(7))}, r"ranks=\[-1, 0-6\] must be >= 0; remove -1"),
        ({"ranks": (0, *range(7))}, r"ranks=\[0, 0-6\] must not repeat \[0\]; "),
        ({"ranks": (0, 1)}, r"ranks=0-1 must number TP\*CP\*DP\*PP=2\*1\*2\*2=8, not 2; "),
        ({"context_parallel_size": 0}, r"context_parallel_size=0 must be >= 1; "),
        ({"expert_model_parallel_size": 0}, r"expert_model_parallel_size=0 must be >= 1; "),
        (
            {"expert_model_parallel_size": 4},
            r"expert_tensor_.*\*expert_model_.*=2\*4=8 must divide .* TP\*CP\*DP=2\*1\*2=4; ",
        ),
        ({"layers_per_stage": (8,)}, r"layers_per_stage=\[8\] must have .*size=2 entries; "),
        ({"layers_per_stage": (8, 0)}, r"layers_per_stage=\[8, 0\] must be >= 1 everywhere; "),
    ],
    ids=str,
)
def test_placement_refuses_contradiction(changes, message):
    with pytest.raises(LayoutError, match=r"^modules\.language: " + message):
        language(**changes)


def test_placement_refuses_sequence_parallel_without_tensor_parallel():
    with pytest.raises(LayoutError, match=r"sequence_parallel=true must go with .* > 1, not 1; "):
        ModulePlacement(name="vision", ranks=(0,), sequence_parallel=True)
