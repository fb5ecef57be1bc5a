"""Plans and checks heterogeneous layouts for Megatron-LM."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import NoReturn

from megatron_mosaic.commands import args as args_command
from megatron_mosaic.commands import check, patch, plan, profile, rehearse, show
from megatron_mosaic.errors import HostError, LayoutError, PlanError, ScheduleError

_COMMANDS: Mapping[str, tuple[ModuleType, str]] = {
    "plan": (plan, "find the best plan for a model on a cluster"),
    "check": (check, "check a plan and print its layout"),
    "show": (show, "print or draw the schedule and what is predicted"),
    "rehearse": (rehearse, "run a plan's ranks on this machine, with thin modules"),
    "profile": (profile, "measure devices and links, and write a cluster file"),
    "args": (args_command, "write a plan as arguments of Megatron or of a launcher"),
    "patch": (patch, "give a checkout of Megatron-LM --mosaic-plan, or take it back"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, 2 if the user's input cannot work, or what the command says."""
    args = _parser().parse_args(argv)
    status = 0
    try:
        status = args.run(args) or 0
        sys.stdout.flush()
    except (PlanError, LayoutError, HostError) as error:
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, ScheduleError):
            print(error.table, file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough. Python flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, as every other error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; run '{self.prog} --help'\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="megatron-mosaic", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (command, explanation) in _COMMANDS.items():
        subparser = commands.add_parser(name, help=explanation)
        subparser.set_defaults(run=command.run)
        command.add_arguments(subparser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
