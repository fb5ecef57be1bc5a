"""Time of encoders on ranks of their own that take several microbatches in a task."""

from collections.abc import Sequence

from megatron_mosaic.cost.pipeline import PipelineStage, Ways, longest_stay_s


def grouped_s(
    encoder: Sequence[PipelineStage],
    *,
    hops_s: Sequence[float],
    rest_s: tuple[float, float],
    num_tasks: int,
    depth: int,
) -> float:
    """Estimates a step that one such encoder limits, while all others keep up with it.

    The encoder is one group ahead of the language model.

    Args:
        encoder: Its stages, with times of one task.
        hops_s: After each stage, the last to the language model.
        rest_s: Time of the language model's pipeline for one group, and for all of them.
        num_tasks: Groups of the step.
        depth: Groups that are in the language model's pipeline at once.
    """
    one_s, all_s = rest_s
    back = encoder[-1].backward_s is not None
    forward_s = sum(stage.forward_s for stage in encoder) + sum(hops_s)
    backward_s = sum(stage.backward_s or 0.0 for stage in encoder) + back * sum(hops_s)
    longest_s = forward_s + all_s + backward_s
    before_s, before_back_s, distance = 0.0, 0.0, depth + 1
    for stage, hop_s in zip(encoder, hops_s, strict=True):
        round_s = forward_s - before_s + one_s + backward_s - before_back_s
        ways = Ways(
            distance=distance,
            to_forward_s=before_s,
            to_backward_s=before_s + round_s,
            from_forward_s=round_s - stage.forward_s + before_back_s,
            from_backward_s=before_back_s,
        )
        longest_s = max(longest_s, longest_stay_s(stage, ways, num_tasks=num_tasks))
        if back:
            # Its last task waits for an earlier one to come back, and that one for another.
            rounds = max(num_tasks - 1, 0) // (distance + 1)
            longest_s = max(longest_s, before_s + (rounds + 1) * round_s + before_back_s)
        before_s += stage.forward_s + hop_s
        before_back_s += (stage.backward_s or 0.0) + back * hop_s
    steady = max(num_tasks - 1 - distance, 0)
    if back and steady:
        # All its stages warm up with as many groups, so after that one works at a time: the last
        # begins a group that the first has begun after the group before came back.
        serial_s = before_s + before_back_s - 2 * hops_s[-1]
        last_s = serial_s + (num_tasks - 1 - steady) * (encoder[0].backward_s or 0.0)
        round_s = forward_s + one_s + backward_s
        return max(longest_s, round_s + (steady - 1) * serial_s + max(last_s, round_s))
    return longest_s
