"""LayerNorm and RMSNorm of local layer specs, without TransformerEngine or Apex."""

from typing import Any

import torch
import torch.nn.functional as F

from megatron_mosaic.errors import LayoutError


class LocalNorm(torch.nn.Module):
    """Norm over the hidden dimension that knows sequence parallelism.

    Upstream's own fallback refuses sequence parallelism, because nothing tells the gradient
    synchronisation that its parameters saw only a part of the sequence.

    Args:
        config: TransformerConfig; ``normalization`` chooses the norm, ``sequence_parallel`` marks
            the parameters, whose gradients are then summed over the tensor-parallel group.
        hidden_size: Size of the last dimension.
        eps: Added to the variance.
        persist_layer_norm: Ignored; it chooses a CUDA kernel.
        zero_centered_gamma: Stores the weight minus 1; ``config`` may ask for it too.
        normalization: Ignored as in upstream's wrapper; the config decides.

    Raises:
        LayoutError: ``config.normalization`` is another norm.
    """

    def __init__(
        self,
        config: Any,
        hidden_size: int,
        eps: float = 1e-5,
        persist_layer_norm: bool = False,
        zero_centered_gamma: bool = False,
        normalization: str = "LayerNorm",
    ) -> None:
        super().__init__()
        if config.normalization not in ("LayerNorm", "RMSNorm"):
            raise LayoutError(
                f"norm: normalization={config.normalization!r} must be LayerNorm or RMSNorm "
                f"in a local layer spec; use one of them or TransformerEngine"
            )
        self.hidden_size = hidden_size
        self.eps = eps
        self.zero_centered_gamma = zero_centered_gamma or config.layernorm_zero_centered_gamma
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        self.bias = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        self.reset_parameters()
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def reset_parameters(self) -> None:
        """Makes the norm start without scale and shift."""
        torch.nn.init.constant_(self.weight, 0.0 if self.zero_centered_gamma else 1.0)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises ``[..., hidden_size]``."""
        weight = self.weight + 1 if self.zero_centered_gamma else self.weight
        if self.bias is None:
            return F.rms_norm(x, (self.hidden_size,), weight, self.eps)
        return F.layer_norm(x, (self.hidden_size,), weight, self.bias, self.eps)
