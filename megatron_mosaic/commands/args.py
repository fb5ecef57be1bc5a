"""Writes a plan as arguments, configuration or launch lines of other programs."""

import argparse
import sys
from pathlib import Path

from megatron_mosaic.errors import PlanError
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.planner.emit.emission import Launch
from megatron_mosaic.planner.emit.formats import FORMATS, emit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("plan", type=Path, help="plan file, YAML")
    parser.add_argument("--format", choices=FORMATS, required=True, help="for whom")
    parser.add_argument("--script", default="pretrain_vlm.py", help="training script to launch")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="processes of a node")


def run(args: argparse.Namespace) -> None:
    """Prints the plan in the format; what the user has to see to goes to the error stream."""
    if args.gpus_per_node < 1:
        raise PlanError(f"--gpus-per-node={args.gpus_per_node} must be >= 1; give a node's GPUs")
    launch = Launch(plan_path=str(args.plan), script=args.script, gpus_per_node=args.gpus_per_node)
    emission = emit(Plan.load(args.plan), form=args.format, launch=launch)
    print(emission.text)
    for note in emission.notes:
        print(f"note: {note}", file=sys.stderr)
