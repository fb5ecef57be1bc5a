"""What runs in the arms: pairs of an encoder and a language model, and sets of small modules."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from benchmarks.sharing.modules import Tower
from benchmarks.sharing.setting import Setting

LANGUAGE = "language"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Modules of one step on one GPU.

    Args:
        name: For people.
        encoders: All of them feed the language model.
        language: The language model, or the text tower of a contrastive loss.
        num_microbatches: Of a step.
        contrastive: Whether encoders are matched with the text tower.
    """

    name: str
    encoders: Mapping[str, Tower]
    language: Tower
    num_microbatches: int
    contrastive: bool = False

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of modules as plans have them: sorted."""
        return tuple(sorted((*self.encoders, LANGUAGE)))


# Source: config.json of openai/clip-vit-large-patch14-336 on Hugging Face, the vision_config: 336
# pixels in patches of 14 are 24 x 24 tokens.
_VIT_L = Tower(hidden=1024, layers=24, heads=16, groups=16, ffn=4096, tokens=576, items=1, rows=64)
# Source: config.json of google/siglip-so400m-patch14-384, the vision_config: 27 x 27 tokens.
_SIGLIP = Tower(hidden=1152, layers=27, heads=16, groups=16, ffn=4304, tokens=729, items=4, rows=81)
# A ViT of 2 billion parameters: 12 * 40 * 2048^2 = 2.0e9. Ours.
_VIT_2B = Tower(hidden=2048, layers=40, heads=16, groups=16, ffn=8192, tokens=576, items=8, rows=64)
# Source: config.json of meta-llama/Llama-3.2-1B, and of meta-llama/Meta-Llama-3-8B with 8 of its
# 32 layers, about what a pipeline stage has of it.
_LLM_1B = Tower(
    hidden=2048, layers=16, heads=32, groups=8, ffn=8192, tokens=512, items=1, vocab=128256,
    gated=True,
)  # fmt: skip
_LLM_8B_8L = Tower(
    hidden=4096, layers=8, heads=32, groups=8, ffn=14336, tokens=2048, items=1, vocab=128256,
    gated=True,
)  # fmt: skip
# Sizes of ImageBind's smaller towers. Source: models/imagebind_model.py of
# facebookresearch/ImageBind, imagebind_huge; tokens without the class token.
_AUDIO = Tower(hidden=768, layers=12, heads=12, groups=12, ffn=3072, tokens=228, items=8)
_DEPTH = Tower(hidden=384, layers=12, heads=8, groups=8, ffn=1536, tokens=196, items=8)
_THERMAL = Tower(hidden=768, layers=12, heads=12, groups=12, ffn=3072, tokens=196, items=8)
_IMU = Tower(hidden=512, layers=6, heads=8, groups=8, ffn=2048, tokens=250, items=8)
_TEXT = Tower(
    hidden=1024, layers=24, heads=16, groups=16, ffn=4096, tokens=77, items=8, vocab=49408
)


def _pair(name: str, encoder: Tower, language: Tower, *, num_microbatches: int = 4) -> Case:
    return Case(
        name=name,
        encoders={"vision": encoder},
        language=language,
        num_microbatches=num_microbatches,
    )


CASES = (
    _pair("ViT-L b1 / 1B s512", _VIT_L, _LLM_1B),
    _pair("ViT-L b4 / 1B s512", replace(_VIT_L, items=4), _LLM_1B),
    _pair("ViT-L b1 / 1B s2048", _VIT_L, replace(_LLM_1B, tokens=2048)),
    _pair("ViT-L b4 / 8B-8L s2048", replace(_VIT_L, items=4), _LLM_8B_8L),
    _pair("ViT-L b16 / 8B-8L s2048", replace(_VIT_L, items=16), _LLM_8B_8L),
    _pair("SigLIP b4 / 1B s2048", _SIGLIP, replace(_LLM_1B, tokens=2048)),
    _pair(
        "ViT-2B b8 / 8B-8L s8192",
        _VIT_2B,
        replace(_LLM_8B_8L, tokens=8192),
        num_microbatches=2,
    ),
    _pair("ViT-L b1 / 8B-8L s8192", _VIT_L, replace(_LLM_8B_8L, tokens=8192), num_microbatches=2),
    Case(
        name="ImageBind-like, 5 towers",
        encoders={"audio": _AUDIO, "depth": _DEPTH, "imu": _IMU, "thermal": _THERMAL},
        language=_TEXT,
        num_microbatches=4,
        contrastive=True,
    ),
    Case(
        name="OFASys-like, 4 modules",
        encoders={
            "audio": replace(_AUDIO, rows=57),
            "motion": replace(_IMU, rows=50),
            "vision": replace(_THERMAL, rows=49, items=8),
        },
        language=replace(_TEXT, tokens=256),
        num_microbatches=4,
    ),
)
"""Pairs of the table of shapes that were modelled before anything was measured, and two sets of
small modules. Sequences of the table begin with rows of the encoder where that has any."""


def cases_for(setting: Setting) -> tuple[Case, ...]:
    """The cases, or a pair and a set of tiny ones."""
    if not setting.tiny:
        return CASES
    encoder = Tower(hidden=32, layers=1, heads=2, groups=2, ffn=48, tokens=12, items=2, rows=4)
    language = Tower(
        hidden=32, layers=1, heads=4, groups=2, ffn=48, tokens=16, items=2, vocab=64, gated=True
    )
    three: dict[str, Tower] = dict.fromkeys(("audio", "depth", "vision"), encoder)
    return (
        Case(name="tiny pair", encoders={"vision": encoder}, language=language, num_microbatches=3),
        Case(
            name="tiny towers",
            encoders=three,
            language=replace(language, gated=False, groups=4),
            num_microbatches=2,
            contrastive=True,
        ),
    )
