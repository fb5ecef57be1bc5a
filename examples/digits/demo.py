"""Trains a vision-language model on real digits under three layouts, and compares them.

Started by ``make demo``, or by ``python -m examples.digits.demo`` at the root of the repository.
"""

import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from examples.digits.picture import draw
from examples.digits.progress import following
from examples.digits.runs import FOLDER, Outcome, Run, RunError, execute
from examples.digits.summary import summary
from examples.digits.verdict import broken_promises
from megatron_mosaic.schedule.measured import read_trace, typical_step

OUTPUT = Path("out/digits")
ONE_PROCESS, HOMOGENEOUS, PLAN = "one process", "homogeneous", "plan"
LAYOUTS = {
    ONE_PROCESS: "stock Megatron, no plan",
    HOMOGENEOUS: "4 ranks; vision and language TP2 DP2",
    PLAN: "4 ranks; vision DP4, language TP2 PP2",
}


def main() -> int:
    """Runs the demo. Returns 0, or 1 if a run failed or a promise was broken."""
    started_s = time.monotonic()
    console = Console(highlight=False)
    folder = _empty_folder()
    console.print("A vision-language model learns to name 1,437 handwritten digits.\n")
    for title, layout in LAYOUTS.items():
        console.print(f"  {title:<12} {layout}")
    console.print()
    try:
        _train(_initial_weights(folder), folder=folder, console=console)
        runs = (_one_process(folder), _planned(HOMOGENEOUS, folder), _planned(PLAN, folder))
        outcomes = {run.title: _train(run, folder=folder, console=console) for run in runs}
    except RunError as error:
        console.print(f"\nerror: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    console.print()
    console.print(summary(outcomes))
    console.print(f"picture: {_draw(outcomes, folder)}", soft_wrap=True)
    return _conclude(console, outcomes, total_s=time.monotonic() - started_s)


def _empty_folder() -> Path:
    folder = OUTPUT.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _initial_weights(folder: Path) -> Run:
    """A step of stock Megatron at learning rate zero, with which every schedule starts."""
    save = ("--save", str(folder / "weights"), "--save-interval", "1", "--exit-interval", "1")
    return Run(
        name="weights",
        title="initial weights",
        num_steps=1,
        arguments=(*save, "--no-save-optim", "--no-save-rng"),
    )


def _one_process(folder: Path) -> Run:
    return Run(name="one_process", title=ONE_PROCESS, arguments=_start(folder))


def _planned(name: str, folder: Path) -> Run:
    return Run(
        name=name,
        title=name,
        arguments=(*_start(folder), "--mosaic-trace", str(folder / f"trace_{name}")),
        plan=FOLDER / f"{name}.yaml",
    )


def _start(folder: Path) -> tuple[str, ...]:
    return ("--load", str(folder / "weights"), "--finetune")


def _train(run: Run, *, folder: Path, console: Console) -> Outcome:
    with following(run.title, num_steps=run.num_steps, console=console) as follow:
        return execute(run, folder=folder, follow=follow)


def _draw(outcomes: Mapping[str, Outcome], folder: Path) -> Path:
    logs = {title: outcome.log for title, outcome in outcomes.items()}
    steps = {
        f"{title}: {LAYOUTS[title]}": typical_step(read_trace(folder / f"trace_{title}"))
        for title in (HOMOGENEOUS, PLAN)
    }
    return draw(logs, steps, path=folder / "digits.png")


def _conclude(console: Console, outcomes: Mapping[str, Outcome], *, total_s: float) -> int:
    broken = broken_promises({title: outcome.log for title, outcome in outcomes.items()})
    for promise in broken:
        console.print(f"error: {promise}", style="red", markup=False, soft_wrap=True)
    if not broken:
        console.print(f"All three agree; the demo took {total_s:.0f} s.")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
