"""How the language model attends: by which mask, and which rank keeps which tokens."""

from dataclasses import dataclass, fields
from typing import Literal, get_args

from megatron_mosaic.errors import PlanError
from megatron_mosaic.fields import nearest, show
from megatron_mosaic.tokens.names import Method, Preset

KeyExchange = Literal["auto", "blocks", "all_gather"]
"""How keys and values reach the ranks whose queries see them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionPlan:
    """Attention of the language model under a multimodal mask, on one rank or context-parallel.

    Args:
        mask: What items (images, sounds) and packed documents of a sequence mean to attention.
        tokens: Which context-parallel rank keeps which tokens: ``balanced`` as many on each, at
            equal cost of attention; ``local`` lets packed documents stay together.
        keys: With context parallelism ``blocks`` sends a rank what its queries see, ``all_gather``
            sends everything to every rank, ``auto`` takes the one that moves fewer bytes at the
            busiest rank; the planner writes what it predicts to be faster.

    Raises:
        PlanError: A field is another word.
    """

    mask: Preset
    tokens: Method = "balanced"
    keys: KeyExchange = "auto"

    def __post_init__(self) -> None:
        for field, words in (("mask", Preset), ("tokens", Method), ("keys", KeyExchange)):
            value, known = getattr(self, field), get_args(words)
            if value not in known:
                advice = nearest(value, known, otherwise="write one of them")
                raise PlanError(
                    f"attention.{field}={show(value)} must be one of {', '.join(known)}; {advice}"
                )

    def written(self) -> dict[str, str]:
        """The keys as a plan file has them: those with default values left out."""
        return {
            field.name: value
            for field in fields(self)
            if (value := getattr(self, field.name)) != field.default
        }
