"""Upstream's ``pretrain_vlm.py`` of both versions: as it is, under plans, and with the patches.

The reference is the stock script in one process, from the same initial weights. Needs checkouts:
``MEGATRON_LM_DIR`` of core_v0.19.0, ``MEGATRON_LM_MAIN_DIR`` of main of August 2026.
"""

import shutil

import pytest

from megatron_mosaic.cli import main
from tests.upstream.checkouts import VARIABLES, copy_of, differences, upstream
from tests.upstream.runs import Run, Runner

BOUND = 1e-5
HEAD = "format: 1\nglobal_batch_size: 16\nmicro_batch_size: 2\nedges: [[vision, language]]\n"
PLANS = {
    "homogeneous_tp2": """world_size: 2
modules:
  vision: {ranks: 0-1, tensor_model_parallel_size: 2}
  language: {ranks: 0-1, tensor_model_parallel_size: 2}
schedule: {kind: colocated}
""",
    "colocated_dp2_tp2": """world_size: 2
modules:
  vision: {ranks: 0-1, data_parallel_size: 2}
  language: {ranks: 0-1, tensor_model_parallel_size: 2, sequence_parallel: true}
schedule: {kind: colocated, encoder_group: 4}
""",
    "disjoint_dp1_tp2": """world_size: 3
modules:
  vision: {ranks: 2}
  language: {ranks: 0-1, tensor_model_parallel_size: 2}
schedule: {kind: 1f1b}
""",
    "colocated_dp2_pp2": """world_size: 2
modules:
  vision: {ranks: 0-1, data_parallel_size: 2}
  language: {ranks: 0-1, pipeline_model_parallel_size: 2}
schedule: {kind: colocated, encoder_group: 4}
""",
    "both_cp2_pp2": """world_size: 4
modules:
  vision: {ranks: 0-3, context_parallel_size: 2, pipeline_model_parallel_size: 2}
  language: {ranks: 0-3, context_parallel_size: 2, pipeline_model_parallel_size: 2}
schedule: {kind: colocated, encoder_group: 4}
""",
    "concurrent_dp2_tp2": """world_size: 2
modules:
  vision: {ranks: 0-1, data_parallel_size: 2}
  language: {ranks: 0-1, tensor_model_parallel_size: 2}
schedule: {kind: concurrent}
""",
    "bubble_fill_dp2_pp2": """world_size: 2
modules:
  vision: {ranks: 0-1, data_parallel_size: 2}
  language: {ranks: 0-1, pipeline_model_parallel_size: 2}
schedule: {kind: bubble_fill, max_live: 4}
""",
}
SIZES = {name: int(text.split()[1]) for name, text in PLANS.items()}
REPLACED = [
    "get_forward_backward_func",
    "maybe_save_dataloader_state",
    "num_floating_point_operations",
]


STOCK = Run(name="stock", by_name=True)
BARE = Run(name="bare")
BARE_LAUNCHED = Run(name="bare_launched", launched=True)


def _planned(name, *, launched):
    return Run(name=name, num_ranks=SIZES[name], plan=HEAD + PLANS[name], launched=launched)


@pytest.fixture(scope="module", params=VARIABLES)
def tree(request, tmp_path_factory):
    """A copy of the checkout."""
    return copy_of(upstream(request.param), tmp_path_factory.mktemp("upstream"))


@pytest.fixture(scope="module")
def as_it_is(tree, tmp_path_factory):
    """Runs the unmodified tree."""
    run = Runner(tree, tmp_path_factory.mktemp("runs"))
    yield run
    run.close()


@pytest.fixture(scope="module")
def patched_tree(as_it_is, tree, tmp_path_factory):
    """A patched copy of the tree, with what Python compiled for the first run of it."""
    as_it_is(STOCK)
    copy = tmp_path_factory.mktemp("patched") / tree.name
    shutil.copytree(tree, copy)
    assert main(["patch", str(copy)]) == 0
    return copy


@pytest.fixture(scope="module")
def patched(patched_tree, tmp_path_factory):
    """Runs the patched tree, started by Python alone."""
    run = Runner(patched_tree, tmp_path_factory.mktemp("runs"))
    yield run
    run.close()


def _largest_difference(losses, reference):
    assert len(losses) == len(reference) == 5  # three steps, validation, test
    return max(abs(own - other) / other for own, other in zip(losses, reference, strict=True))


@pytest.mark.parametrize("plan", PLANS)
def test_script_as_it_is_trains_under_a_plan_as_stock_does(as_it_is, plan):
    (stock,) = as_it_is(STOCK)

    for record in as_it_is(_planned(plan, launched=True)):
        assert _largest_difference(record.losses, stock.losses) <= BOUND
        assert record.replaced == REPLACED


@pytest.mark.parametrize("plan", PLANS)
def test_patched_script_trains_under_a_plan_to_the_same_bits(as_it_is, patched, plan):
    launched = as_it_is(_planned(plan, launched=True))

    for record, other in zip(patched(_planned(plan, launched=False)), launched, strict=True):
        assert record.losses == other.losses
        assert record.weights == other.weights
        assert record.replaced == []


def test_script_without_the_flag_trains_to_the_same_bits(as_it_is, patched):
    (bare,) = as_it_is(BARE)

    assert bare.losses[0] > bare.losses[2]
    assert as_it_is(BARE_LAUNCHED) == [bare]
    assert patched(BARE) == [bare]


def test_reverted_tree_is_the_checkout(patched_tree, tmp_path):
    checkout = upstream(patched_tree.name).folder
    copy = tmp_path / "copy"
    shutil.copytree(patched_tree, copy)
    assert len(differences(copy, checkout)) == 4

    assert main(["patch", str(copy), "--revert"]) == 0

    assert differences(copy, checkout) == []
