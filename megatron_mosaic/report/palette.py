"""Colours of modules and of terms, the same in every picture."""

from collections.abc import Iterable, Mapping

from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.report.prediction import MEMORY_TERMS, TIME_TERMS

# Forward and backward pass of the language model, then of the other modules in turn. A test keeps
# them apart for the colour-blind too.
_LANGUAGE_COLORS = ("#d9752b", "#f6cfa6")
_COLORS = (
    ("#1f7a8c", "#a9d6de"),
    ("#7f2ad1", "#ceadf1"),
    ("#143d14", "#a0b5a0"),
    ("#b08f6d", "#e1d4c8"),
    ("#290c45", "#aea3b8"),
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
    zip(
        TIME_TERMS,
        ("#17406d", "#c9a227", "#7ba0c4", "#e1e6ea", "#5d6873", "#98a3ad"),
        strict=True,
    )
)


def module_colors(modules: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colours of the forward and the backward tasks of modules, in the order of the modules."""
    names = list(dict.fromkeys(modules))
    others = [name for name in names if name != LANGUAGE]
    colors = {name: _COLORS[n % len(_COLORS)] for n, name in enumerate(others)}
    return {name: colors.get(name, _LANGUAGE_COLORS) for name in names}
