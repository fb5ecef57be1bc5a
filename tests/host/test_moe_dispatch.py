import pytest

from megatron_mosaic.errors import HostError
from megatron_mosaic.host.moe.dispatch import check_equal_lengths
from megatron_mosaic.layout.placement import ModulePlacement

SHARED = {"data_parallel_size": 4, "expert_model_parallel_size": 2}


def check(images, **sizes):
    num_ranks = 4 * sizes.get("pipeline_model_parallel_size", 1)
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
