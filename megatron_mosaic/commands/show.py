"""Prints the schedule of every rank."""

import argparse
from pathlib import Path

from megatron_mosaic.layout.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("plan", type=Path, help="plan file, YAML")


def run(args: argparse.Namespace) -> None:
    """Prints the plan's schedule."""
    from megatron_mosaic.schedule.build import build_schedule
    from megatron_mosaic.schedule.drawing import draw

    print(draw(build_schedule(Plan.load(args.plan))))
