"""Words of plan and model files for masks and assignments; free of numpy, as plans are."""

from typing import Literal

Preset = Literal[
    "causal", "prefix_lm", "encoder_prepended", "encoder_embedded", "multimodal_packed"
]
"""What items and documents of a sequence mean to attention."""

Method = Literal["contiguous", "zigzag", "lpt", "balanced", "local"]
"""How the tokens of a sequence are assigned to context-parallel ranks."""
