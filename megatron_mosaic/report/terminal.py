"""A prediction as text for the terminal: memory bars, and where the time goes."""

from collections.abc import Iterator, Mapping
from textwrap import shorten

from megatron_mosaic.report.prediction import MEMORY_TERMS, TIME_TERMS, Memory, Prediction
from megatron_mosaic.report.units import gib, seconds

_FILLS: Mapping[str, str] = dict(zip(MEMORY_TERMS, "█▓▒░:=", strict=True))


def describe(prediction: Prediction, *, width: int = 100) -> str:
    """Describes a prediction; empty if the plan has none.

    Args:
        prediction: The prediction.
        width: Columns of the terminal.

    Returns:
        Paragraphs with an empty line between them, without a final newline.
    """
    paragraphs = [list(_step(prediction)), list(_memory(prediction, width=width))]
    return "\n\n".join("\n".join(lines) for lines in paragraphs if lines)


def _step(prediction: Prediction) -> Iterator[str]:
    if prediction.step_s is None:
        return
    headline = f"step {seconds(prediction.step_s)}"
    other_s = prediction.baseline_step_s
    if other_s is not None:
        ratio = other_s / prediction.step_s if prediction.step_s else 1.0
        name = f", {prediction.baseline_layout}" if prediction.baseline_layout else ""
        headline += f", {ratio:.2f} times as fast as the baseline{name}: {seconds(other_s)}"
    yield headline
    columns: list[tuple[str, Mapping[str, float], float]] = []
    if prediction.breakdown:
        columns.append(("plan", prediction.breakdown, prediction.step_s))
    if prediction.breakdown and prediction.baseline_breakdown and other_s is not None:
        columns.append(("baseline", prediction.baseline_breakdown, other_s))
    if columns:
        yield f"{'':15}" + "".join(f"{name:>20}" for name, _, _ in columns)
    named = [term for term in TIME_TERMS if any(term in terms for _, terms, _ in columns)]
    for term in named:
        cells = [_share(terms.get(term, 0.0), total_s) for _, terms, total_s in columns]
        yield f"{term.removesuffix('_s'):15}" + "".join(f"{cell:>20}" for cell in cells)


def _share(value_s: float, total_s: float) -> str:
    return f"{seconds(value_s)}  {value_s / total_s if total_s else 0.0:5.1%}"


def _memory(prediction: Prediction, *, width: int) -> Iterator[str]:
    if not prediction.memory:
        return
    capacity_bytes = prediction.capacity_bytes
    full_bytes = max(bar.total_bytes for bar in prediction.memory)
    full_bytes = max(full_bytes, capacity_bytes or 0.0) or 1.0
    of = f" of {gib(capacity_bytes)}" if capacity_bytes else ""
    terms = " ".join(f"{fill} {term}" for term, fill in _FILLS.items())
    yield f"memory{of}: {terms}"
    labels = [shorten(bar.ranks, width // 3, placeholder=" ...]") for bar in prediction.memory]
    label_width = max(map(len, labels))
    for bar, label in zip(prediction.memory, labels, strict=True):
        total = f"{gib(bar.total_bytes):>10}"
        if capacity_bytes:
            total += f" {bar.total_bytes / capacity_bytes:4.0%}"
        lead = f"ranks {label:{label_width}}  "
        room = max(10, width - len(lead) - len(total) - 2)
        yield f"{lead}{_bar(bar, full_bytes=full_bytes, width=room)} {total}"


def _bar(bar: Memory, *, full_bytes: float, width: int) -> str:
    """Cells of a bar; ends are rounded as a whole, so that their sum is not off by several."""
    cells, total_bytes = "", 0.0
    for term, value_bytes in bar.terms.items():
        total_bytes += value_bytes
        cells += _FILLS[term] * (round(width * total_bytes / full_bytes) - len(cells))
    return cells.ljust(width, "·")
