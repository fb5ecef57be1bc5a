"""The report as one HTML page that needs nothing but itself."""

import json
import zlib
from base64 import b64encode
from importlib.resources import files
from pathlib import Path
from typing import Any

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.report.page_data import Drawn, page_data
from megatron_mosaic.report.prediction import Prediction, read_baseline, read_prediction
from megatron_mosaic.report.step import read_step
from megatron_mosaic.report.summary import in_brackets
from megatron_mosaic.report.units import seconds

# In the order in which each needs those before it.
_SCRIPTS = (
    "numbers",
    "step",
    "view",
    "theme",
    "rows",
    "memory",
    "words",
    "panels",
    "input",
    "main",
)


def write_page(plan: Plan, path: Path, *, name: str, trace: Path | None = None) -> None:
    """Writes the report of a plan.

    Args:
        plan: The plan.
        path: HTML file to write.
        name: Of the plan file.
        trace: Folder of a traced run of the plan, to be drawn beside the simulation.

    Raises:
        PlanError: The prediction or the trace cannot be read.
        LayoutError: The homogeneous plan in the prediction contradicts itself.
    """
    prediction, baseline = read_prediction(plan), read_baseline(plan)
    own = _drawn("This plan", plan, prediction, trace=trace)
    other = None
    if baseline is not None and prediction.tasks_s:
        sizes = in_brackets(prediction.baseline_layout)
        other = _drawn(f"The best homogeneous layout{sizes}", *baseline)
    data = page_data(plan, own, name=name, baseline=other)
    path.write_text(page(data), encoding="utf-8")


def _drawn(title: str, plan: Plan, prediction: Prediction, *, trace: Path | None = None) -> Drawn:
    if prediction.step_s is not None:
        title += f": {seconds(prediction.step_s)} a step"
    return Drawn(title, prediction, read_step(plan, prediction, trace=trace))


def page(data: dict[str, Any]) -> str:
    """Puts styles, scripts and data into the page."""
    scripts = "\n".join(_source(f"{name}.js") for name in _SCRIPTS)
    parts = {
        "{{style}}": _source("page.css"),
        # One function around all: nothing of it is seen from outside.
        "{{script}}": f'"use strict";\n(() => {{\n{scripts}}})();',
        "{{data}}": _embedded(data),
    }
    text = _source("page.html")
    for mark, part in parts.items():
        before, after = text.split(mark)
        text = f"{before}{part}{after}"
    return text


def _source(name: str) -> str:
    return (files("megatron_mosaic.report") / "page" / name).read_text(encoding="utf-8")


def _embedded(data: dict[str, Any]) -> str:
    """Compressed JSON, as text that no tag in it can end: columns of numbers shrink to a tenth."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    return b64encode(zlib.compress(text.encode())).decode()
