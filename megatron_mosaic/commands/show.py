"""Prints the schedule of every rank and what is predicted, and draws both."""

import argparse
from pathlib import Path

from megatron_mosaic.errors import LayoutError, PlanError
from megatron_mosaic.layout.plan import Plan

_PICTURES = (".png", ".svg", ".pdf")
_STEPS = (".html", ".json")  # what shows a measured step too


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("plan", type=Path, help="plan file, YAML")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        help="what to write: a report (.html), a trace for ui.perfetto.dev (.json), or a picture "
        "(.png, .svg, .pdf)",
    )
    parser.add_argument(
        "--mask",
        metavar="MODEL",
        help="model whose sequences to draw in the picture instead: the mask of one of them, and "
        "which context-parallel rank computes what",
    )
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="DIR",
        help="folder that a run with --mosaic-trace wrote: shown beside what is predicted",
    )


def run(args: argparse.Namespace) -> None:
    """Prints the plan's schedule and prediction, and writes a file if one is asked for."""
    from megatron_mosaic.report.lanes import describe_lanes
    from megatron_mosaic.report.prediction import read_baseline, read_prediction
    from megatron_mosaic.report.terminal import describe
    from megatron_mosaic.schedule.build import build_schedule
    from megatron_mosaic.schedule.drawing import draw

    _check_arguments(args.output, args.trace)
    _check_mask(args)
    plan = Plan.load(args.plan)
    try:
        described = describe(read_prediction(plan))
        read_baseline(plan)
    except (PlanError, LayoutError) as error:
        raise type(error)(f"{args.plan}: {error}") from None
    print(draw(build_schedule(plan)))
    if lanes := describe_lanes(plan):
        print(lanes)
    if described:
        print()
        print(described)
    if args.output is not None:
        _write(plan, args)


def _write(plan: Plan, args: argparse.Namespace) -> None:
    if args.output.suffix == ".html":
        from megatron_mosaic.report.page import write_page

        write_page(plan, args.output, name=args.plan.name, trace=args.trace)
    elif args.output.suffix == ".json":
        from megatron_mosaic.report.perfetto import write_perfetto

        write_perfetto(plan, args.output, trace=args.trace)
    elif args.mask is not None:
        from megatron_mosaic.model.shipped import load_model
        from megatron_mosaic.report.mask_figure import draw_mask

        draw_mask(plan, load_model(args.mask), args.output)
    else:
        from megatron_mosaic.report.figure import draw_plan

        draw_plan(plan, args.output)


def _check_mask(args: argparse.Namespace) -> None:
    if args.mask is not None and (args.output is None or args.output.suffix not in _PICTURES):
        raise PlanError(
            f"--mask={args.mask} must go with --output that ends with {', '.join(_PICTURES)}, not "
            f"{args.output}; write -o mask.png"
        )


def _check_arguments(output: Path | None, trace: Path | None) -> None:
    if output is not None and output.suffix not in (*_STEPS, *_PICTURES):
        raise PlanError(
            f"--output={output} must end with {', '.join((*_STEPS, *_PICTURES))}; rename it"
        )
    if output is not None and not output.parent.is_dir():
        raise PlanError(f"--output={output} must be in a folder that exists; make {output.parent}")
    if trace is not None and (output is None or output.suffix not in _STEPS):
        raise PlanError(
            f"--trace={trace} must go with --output that ends with {' or '.join(_STEPS)}, "
            f"not {output}; write -o report.html"
        )
