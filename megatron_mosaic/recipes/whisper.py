"""Whisper's encoder of transformers, as Megatron's multimodal models call encoders."""

# Megatron-Bridge is optional.
# pyright: reportMissingImports=false

from typing import Any

import torch
from torch import nn


class WhisperTower(nn.Module):
    """Gives the encoder's last hidden states alone. It is not split: tensor parallelism is 1.

    Args:
        num_layers: Layers.
        hidden_size: Size of a token.
        num_attention_heads: Heads of a layer.
        ffn_hidden_size: Size inside a layer's MLP.
        pg_collection: The module's groups, which Bridge hands to every encoder.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        hidden_size: int,
        num_attention_heads: int,
        ffn_hidden_size: int,
        pg_collection: Any = None,
    ) -> None:
        from transformers import WhisperConfig
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        super().__init__()
        self.encoder = WhisperEncoder(
            WhisperConfig(
                encoder_layers=num_layers,
                d_model=hidden_size,
                encoder_attention_heads=num_attention_heads,
                encoder_ffn_dim=ffn_hidden_size,
            )
        )

    def forward(self, input_features: torch.Tensor) -> torch.Tensor:
        """Encodes spectrograms ``[items, 80, 3000]`` as ``[items, 1500, hidden_size]``."""
        return self.encoder(input_features).last_hidden_state
