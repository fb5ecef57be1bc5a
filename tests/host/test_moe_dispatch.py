import pytest

from megatron_mosaic.errors import HostError
from megatron_mosaic.host.moe.dispatch import check_equal_lengths
from megatron_mosaic.layout.attention import AttentionPlan
from megatron_mosaic.layout.placement import ModulePlacement

SHARED = {"data_parallel_size": 4, "expert_model_parallel_size": 2}


def check(images, **sizes):
    num_ranks = 4 * sizes.get("pipeline_model_parallel_size", 1)
    num_ranks *= sizes.get("context_parallel_size", 1)
    language = ModulePlacement(name="language", ranks=tuple(range(num_ranks)), **sizes)
    check_equal_lengths(images, language=language, samples_per_replica=2)


def test_replicas_that_share_no_expert_may_differ():
    # The longest samples of the four replicas have 2, 2, 1 and 1 images; experts join them in twos.
    check([2, 0, 1, 2, 1, 1, 0, 1], **SHARED)


def test_replicas_that_share_experts_must_not_differ():
    with pytest.raises(HostError, match=r"^data: rows=\[1, 0\] .* of 2 replicas .*; use .* all"):
        check([2, 0, 1, 2, 1, 1, 0, 0], **SHARED)


def test_stages_pad_to_one_length():
    check([2, 0, 1, 1, 1, 1, 0, 0], pipeline_model_parallel_size=2, **SHARED)


def test_a_replica_that_keeps_its_experts_to_itself_may_differ():
    sizes = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "data_parallel_size": 2}
    check([2, 0, 1, 1], **sizes, expert_model_parallel_size=2, expert_tensor_parallel_size=1)


def test_masks_pad_to_one_length():
    check([2, 0, 1, 1, 1, 1, 0, 0], attention=AttentionPlan(mask="causal"), **SHARED)


@pytest.mark.parametrize("tokens", ["lpt", "local"])
def test_replicas_that_share_experts_must_not_have_tokens_by_their_masks(tokens):
    attention = AttentionPlan(mask="multimodal_packed", tokens=tokens)
    sizes = {"data_parallel_size": 4, "context_parallel_size": 2, "expert_model_parallel_size": 4}

    with pytest.raises(HostError, match=rf"attention\.tokens={tokens} must be balanced .*; change"):
        check([1] * 8, attention=attention, **sizes)


def test_replicas_that_share_experts_may_have_equal_tokens_by_their_masks():
    attention = AttentionPlan(mask="multimodal_packed", tokens="balanced")
    sizes = {"data_parallel_size": 4, "context_parallel_size": 2, "expert_model_parallel_size": 4}

    check([2, 0, 1, 1, 1, 1, 0, 0], attention=attention, **sizes)
