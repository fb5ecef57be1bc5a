"""Attention to all keys from attention to some and to others."""

from collections.abc import Sequence

import torch

Computed = tuple[torch.Tensor, torch.Tensor]
"""Output ``[b, heads, s, d]`` and logarithm of the sum of exponentials ``[b, heads, s]``."""


def merge(parts: Sequence[Computed]) -> torch.Tensor:
    """Merges what parts computed, in single precision.

    Source:
        Milakov, Gimelshein, 2018, arXiv:1805.02867, section 3: sums of exponentials are added.
    """
    output = torch.zeros_like(parts[0][0], dtype=torch.float32)
    for (part, _), share in zip(parts, _shares(parts), strict=True):
        output += share * part
    return output


def merge_grads(grad: torch.Tensor, parts: Sequence[Computed]) -> list[Computed]:
    """Gradients of the output and of the logarithm of each part.

    Args:
        grad: Of what was merged, ``[b, heads, s, d]``.
        parts: As they were merged.
    """
    grad = grad.float()
    shares = _shares(parts)
    along = [(grad * part).sum(dim=-1, keepdim=True) for part, _ in parts]
    mean = sum(share * each for share, each in zip(shares, along, strict=True))
    return [
        ((share * grad).to(part.dtype), (share * (each - mean)).squeeze(-1).to(lse.dtype))
        for (part, lse), share, each in zip(parts, shares, along, strict=True)
    ]


def _shares(parts: Sequence[Computed]) -> list[torch.Tensor]:
    """Share of each part in the sum of exponentials; zeros where nothing is seen."""
    lses = torch.stack([lse.detach().float() for _, lse in parts])
    total = torch.logsumexp(lses, dim=0)
    total = torch.where(total == -torch.inf, 0, total)
    return [torch.exp(lse - total).unsqueeze(-1) for lse in lses]
