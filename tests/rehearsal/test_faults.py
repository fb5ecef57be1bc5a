"""A rehearsal passes a plan that runs as it says, and finds every planted fault."""

from functools import cache

import pytest

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.rehearsal.rehearsal import Result, reference_of, rehearse
from tests.rehearsal import faults

LIMIT_S = 100
HEAD = "format: 1\nworld_size: {}\nglobal_batch_size: 8\nmicro_batch_size: 1\nmodules:\n"
EDGES = "edges: [[vision, language]]\n"
# Language model on two replicas, behind an encoder on a rank of its own.
APART = (
    HEAD.format(3) + "  vision: {ranks: 0, trainable: [projector]}\n"
    "  language: {ranks: 1-2, data_parallel_size: 2}\n" + EDGES + "schedule: {kind: 1f1b}\n"
)
# Two stages of unlike depth, with the encoder's replicas in their waits.
STAGES = (
    HEAD.format(2) + "  vision: {ranks: 0-1, data_parallel_size: 2}\n"
    "  language: {ranks: 0-1, pipeline_model_parallel_size: 2, layers_per_stage: [2, 1]}\n"
    + EDGES
    + "schedule: {kind: bubble_fill, encoder_group: 2}\n"
)
# Tensor and sequence parallel, modules one after the other.
SPLIT = (
    HEAD.format(2) + "  vision: {ranks: 0-1, data_parallel_size: 2}\n"
    "  language: {ranks: 0-1, tensor_model_parallel_size: 2, sequence_parallel: true}\n"
    + EDGES
    + "schedule: {kind: colocated, encoder_group: 4}\n"
)
# Both modules at the same time, in lanes.
LANES = STAGES.replace("bubble_fill", "concurrent")
# Two replicas of each half of the experts.
EXPERTS = (
    HEAD.format(4) + "  vision: {ranks: 0-3, data_parallel_size: 4}\n"
    "  language: {ranks: 0-3, data_parallel_size: 4, expert_model_parallel_size: 2}\n"
    + EDGES
    + "schedule: {kind: colocated, encoder_group: 2}\n"
)
PLANS = {"apart": APART, "stages": STAGES, "split": SPLIT, "lanes": LANES, "experts": EXPERTS}

GROUPS, LAYERS, SCHEDULE = "groups", "layers", "schedule"
RUN, PARITY, ORDER = "run to the end", "parity with one process", "order of communication"
CHECKPOINT = "checkpoint"
# Fault, the plan that shows it, and what fails. One that ends a run before it is judged is named by
# what the ranks say.
QUICK = [
    ("swapped_ranks_in_a_group", "stages", GROUPS),
    ("dropped_dependency", "stages", RUN),
    ("wrong_gradient_scale", "stages", PARITY),
    ("sends_that_only_tags_match", "stages", ORDER),
    ("missing_lane_event", "lanes", RUN),
]
OTHERS = [
    ("wrong_replica_id_in_a_checkpoint", "stages", RUN),
    ("layers_on_other_stages", "stages", LAYERS),
    ("stale_route", "apart", RUN),
    ("gradient_not_divided_by_replicas", "apart", PARITY),
    ("sends_posted_in_unlike_order", "stages", SCHEDULE),
    ("wrong_microbatch_order", "apart", RUN),
    ("replicas_train_apart", "apart", GROUPS),
    ("replicas_of_experts_train_apart", "experts", GROUPS),
    ("wrong_rank_order_in_a_route", "apart", RUN),
    ("lost_boundary_gradient", "stages", PARITY),
    ("rounded_activations", "stages", PARITY),
    ("collective_out_of_order", "split", RUN),
    ("collective_on_one_rank_alone", "split", ORDER),
    ("missing_event_of_the_loop", "lanes", RUN),
    ("frozen_part_trains", "apart", PARITY),
    ("trainable_part_is_frozen", "apart", PARITY),
    ("weight_missing_in_a_checkpoint", "stages", RUN),
    ("optimizer_state_not_loaded", "stages", CHECKPOINT),
    ("ranks_begin_with_unlike_weights", "apart", PARITY),
    ("tensor_parallel_norms_not_reduced", "split", PARITY),
    ("reported_losses_of_one_replica", "apart", PARITY),
    ("rank_dies", "apart", RUN),
    ("task_left_out", "stages", RUN),
]
FAULTS = [pytest.param(*each, id=each[0]) for each in QUICK] + [
    pytest.param(*each, id=each[0], marks=pytest.mark.slow) for each in OTHERS
]


@cache
def _reference(name: str):
    # Lanes change nothing of what one process does.
    plan = Plan.loads(PLANS[name].replace("concurrent", "bubble_fill"), where=name)
    return reference_of(plan, time_limit_s=LIMIT_S)


def _rehearsed(name: str, fault=None) -> Result:
    return rehearse(
        Plan.loads(PLANS[name], where=name),
        time_limit_s=LIMIT_S,
        say=lambda text: None,
        before=fault,
        reference=_reference("stages" if name == "lanes" else name),
    )


@pytest.mark.parametrize(
    "name",
    [
        "stages",
        *(pytest.param(each, marks=pytest.mark.slow) for each in PLANS if each != "stages"),
    ],
)
def test_plan_that_runs_as_it_says_passes(name):
    result = _rehearsed(name)

    assert result.passed, (result.findings, result.stacks)


@pytest.mark.parametrize(("fault", "name", "subject"), FAULTS)
def test_planted_fault_is_found(fault, name, subject):
    result = _rehearsed(name, getattr(faults, fault))

    failed = {finding.subject for finding in result.findings if not finding.passed}
    assert subject in failed, result.findings
