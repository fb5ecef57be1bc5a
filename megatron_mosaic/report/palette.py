"""Colours of modules and of terms, the same in every picture."""

from collections.abc import Iterable, Mapping

from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.report.prediction import MEMORY_TERMS, TIME_TERMS

# Forward and backward pass of the language model, then of the other modules in turn.
_LANGUAGE_COLORS = ("#d9752b", "#f6cfa6")
_COLORS = (
    ("#1f7a8c", "#a9d6de"),
    ("#5b4a8a", "#c6bde0"),
    ("#4c8a4a", "#c1dfbf"),
    ("#a33b5e", "#e8bccb"),
    ("#6b6b6b", "#d0d0d0"),
)
# None of a module's: a colour means one thing.
MEMORY_COLORS: Mapping[str, str] = dict(
    zip(
        MEMORY_TERMS,
        ("#17406d", "#4d7aa6", "#9db9d3", "#c9a227", "#ead9a0", "#9aa5ae"),
        strict=True,
    )
)
TIME_COLORS: Mapping[str, str] = dict(
    zip(TIME_TERMS, ("#17406d", "#7ba0c4", "#cfd6dc", "#c9a227", "#ead9a0"), strict=True)
)


def module_colors(modules: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colours of the forward and the backward tasks of modules, in the order of the modules."""
    names = list(dict.fromkeys(modules))
    others = [name for name in names if name != LANGUAGE]
    colors = {name: _COLORS[n % len(_COLORS)] for n, name in enumerate(others)}
    return {name: colors.get(name, _LANGUAGE_COLORS) for name in names}
