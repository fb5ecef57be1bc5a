"""Makes a script's loss right where context-parallel ranks each have a part of the tokens."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

LossOutput = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


def with_loss_over_context(
    forward_step_func: Callable[..., Any], *, group: dist.ProcessGroup, per_token: bool
) -> Callable[..., Any]:
    """Wraps a script's ``forward_step`` so that its loss is the mean over a whole microbatch.

    A script sums the losses of the tokens that it sees and counts them. Megatron divides the one
    by the other on every context-parallel rank and averages over the ranks, which is the mean
    over the microbatch only where all of them have as many tokens that count.

    Args:
        forward_step_func: The script's. A loss function that returns two values, the older form,
            stays as it is: it divides by a count of its own.
        group: Context-parallel group of the language model.
        per_token: ``--calculate-per-token-loss``: gradients are sums, divided at the end.
    """

    def forward_step(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        output, loss_func = forward_step_func(*args, **kwargs)

        def loss_over_context(output: torch.Tensor) -> Any:
            outputs = loss_func(output)
            if len(outputs) != 3:
                return outputs
            return _over_context(outputs, group=group, per_token=per_token)

        return output, loss_over_context

    return forward_step


def _over_context(outputs: LossOutput, *, group: dist.ProcessGroup, per_token: bool) -> LossOutput:
    loss, num_tokens, report = outputs
    # One message: tokens and whatever is reported as a sum with its count.
    sums = {key: value for key, value in report.items() if value.numel() == 2}
    parts = [num_tokens.reshape(1), *(value.reshape(-1) for value in sums.values())]
    total = torch.cat([part.detach().double() for part in parts])
    dist.all_reduce(total, group=group)
    report = report | {
        key: total[1 + 2 * index : 3 + 2 * index].to(value.dtype)
        for index, (key, value) in enumerate(sums.items())
    }
    # Megatron averages gradients over these ranks, except where it sums them for a token's mean.
    scale = 1 if per_token else group.size()
    return loss * scale, total[0].to(num_tokens.dtype), report
