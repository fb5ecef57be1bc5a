"""Prints the schedule of every rank and what is predicted, and draws both."""

import argparse
from pathlib import Path

from megatron_mosaic.errors import PlanError
from megatron_mosaic.layout.plan import Plan

_PICTURES = (".png", ".svg", ".pdf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("plan", type=Path, help="plan file, YAML")
    parser.add_argument("-o", "--output", type=Path, help="picture to write: PNG, SVG or PDF")


def run(args: argparse.Namespace) -> None:
    """Prints the plan's schedule and prediction, and writes a picture if one is asked for."""
    from megatron_mosaic.report.prediction import read_prediction
    from megatron_mosaic.report.terminal import describe
    from megatron_mosaic.schedule.build import build_schedule
    from megatron_mosaic.schedule.drawing import draw

    if args.output is not None:
        _check_output(args.output)
    plan = Plan.load(args.plan)
    try:
        described = describe(read_prediction(plan))
    except PlanError as error:
        raise PlanError(f"{args.plan}: {error}") from None
    print(draw(build_schedule(plan)))
    if described:
        print()
        print(described)
    if args.output is not None:
        from megatron_mosaic.report.figure import draw_plan

        draw_plan(plan, args.output)


def _check_output(path: Path) -> None:
    if path.suffix not in _PICTURES:
        raise PlanError(f"--output={path} must end with {', '.join(_PICTURES)}; rename the picture")
    if not path.parent.is_dir():
        raise PlanError(f"--output={path} must be in a folder that exists; make {path.parent}")
