"""Whether the ranks that share experts can exchange their tokens."""

from collections.abc import Sequence
from math import lcm

from megatron_mosaic.errors import HostError
from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.sharding import splits_sequences


def check_equal_lengths(
    rows: Sequence[int], *, language: ModulePlacement, samples_per_replica: int
) -> None:
    """Checks that replicas which gather each other's tokens have equally many.

    LLaVA pads a replica's microbatch to its longest sample, and all to one length only where the
    language model has stages, ranks with parts of sequences, or a mask. The dispatcher
    ``allgather`` takes the lengths as equal: with others its collectives hang.

    Args:
        rows: Rows that an encoder makes of every sample of a step.
        language: Placement of the language model.
        samples_per_replica: Samples of one data-parallel replica (``micro_batch_size``).

    Raises:
        HostError: They have not; alike on every rank.
    """
    joined = _joined_replicas(language)
    if language.attention is not None:
        _check_equal_slots(language, joined)
        return
    if language.num_stages > 1 or splits_sequences(language):
        return
    samples = joined * samples_per_replica
    for first in range(0, len(rows), samples):
        most = [
            max(rows[start : start + samples_per_replica])
            for start in range(first, first + samples, samples_per_replica)
        ]
        if len(set(most)) > 1:
            raise HostError(
                f"data: rows={most} in the longest sample of {joined} replicas must be equal "
                f"with moe_token_dispatcher_type=allgather, which joins them; "
                f"use --moe-token-dispatcher-type alltoall"
            )


def _check_equal_slots(language: ModulePlacement, joined: int) -> None:
    """Checks that no mask decides how many slots the ranks of a replica have."""
    assert language.attention is not None
    tokens = language.attention.tokens
    if joined > 1 and language.context_parallel_size > 1 and tokens in ("lpt", "local"):
        raise HostError(
            f"modules.language: attention.tokens={tokens} must be balanced with "
            f"moe_token_dispatcher_type=allgather, which joins {joined} replicas with equally many "
            f"tokens each; change it, or use --moe-token-dispatcher-type alltoall"
        )


def _joined_replicas(language: ModulePlacement) -> int:
    """Consecutive data-parallel replicas that run each task together."""
    shape, expert_shape = language.shape, language.expert_shape
    replica = shape.tp * shape.cp
    return lcm(replica, expert_shape.expt_tp * expert_shape.ep) // replica
