"""Runs a Megatron training script under a plan: ``python -m megatron_mosaic.run SCRIPT ARGS``.

Under torchrun every rank runs this. Started by hand with a plan, it checks the plan and launches
the plan's ranks on this machine itself. Without ``--mosaic-plan`` the script runs as it is.
"""

import os
import runpy
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from megatron_mosaic.errors import HostError, LayoutError, PlanError, ScheduleError

PLAN, DEVICE = "--mosaic-plan", "--mosaic-device"
# Distributions of their own that put a package beside Megatron-LM's into the namespace.
NEIGHBOURS = frozenset({"bridge", "energon"})
USAGE = f"python -m megatron_mosaic.run [{DEVICE} cpu|cuda] SCRIPT [ARGS] [{PLAN} plan.yaml]"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a script. Returns 0, or 2 if plan, script or environment cannot work."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        device = _take(arguments, DEVICE)
        script = _script(arguments)
        plan = _look_up(arguments, PLAN)
        if plan is not None and "RANK" not in os.environ:
            return _launch(plan, script, arguments, device=device)
        _run(script, arguments, device=device, planned=plan is not None)
    except (PlanError, LayoutError, HostError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if isinstance(error, ScheduleError):
            print(error.table, file=sys.stderr, flush=True)
        return 2
    return 0


def _look_up(arguments: Sequence[str], option: str) -> str | None:
    """Finds the value of an option, given as ``--option value`` or ``--option=value``."""
    for index, argument in enumerate(arguments):
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2]
        if argument == option:
            if index + 1 == len(arguments):
                raise HostError(f"run: {option}= must have a value; usage: {USAGE}")
            return arguments[index + 1]
    return None


def _take(arguments: list[str], option: str) -> str | None:
    """Removes an option that the script does not know, and returns its value."""
    value = _look_up(arguments, option)
    for index, argument in enumerate(arguments):
        if argument == option:
            del arguments[index : index + 2]
            break
        if argument.startswith(f"{option}="):
            del arguments[index]
            break
    if option == DEVICE and value not in (None, "cpu", "cuda"):
        raise HostError(f"run: {option}={value} must be cpu or cuda; choose one of them")
    return value


def _script(arguments: list[str]) -> Path:
    if not arguments or arguments[0].startswith("-"):
        given = arguments[0] if arguments else ""
        raise HostError(f"run: script={given} must be the first argument; usage: {USAGE}")
    script = Path(arguments[0])
    if not script.is_file():
        raise HostError(f"run: script={script} must be a file; give the path of a training script")
    return script


def _launch(plan_path: str, script: Path, arguments: Sequence[str], *, device: str | None) -> int:
    """Checks the plan and starts its ranks on this machine. Returns their exit status."""
    from megatron_mosaic.layout.plan import Plan
    from megatron_mosaic.schedule.build import build_schedule
    from megatron_mosaic.schedule.verify import verify

    if "{world_size}" in plan_path:
        raise HostError(
            f"run: {PLAN}={plan_path} must name one file when no launcher says how many ranks "
            f"there are; write their number, or start it with torchrun"
        )
    plan = Plan.load(plan_path)
    verify(plan, build_schedule(plan))
    _check_one_megatron(script)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(plan.world_size), "-m", "megatron_mosaic.run"),
        *((DEVICE, device) if device else ()),
        *arguments,
    ]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.stdout.flush()
    os.execv(sys.executable, command)


def _run(script: Path, arguments: Sequence[str], *, device: str | None, planned: bool) -> None:
    """Runs the script in this process, as Python would."""
    # Python puts the script's folder first; so does it for a script in a checkout of Megatron.
    sys.path.insert(0, str(script.resolve().parent))
    sys.argv = list(arguments)
    if planned:
        _check_one_megatron(script)
    with ExitStack() as scope:
        if planned or device is not None:
            from megatron_mosaic.host.cpu import cpu_wanted, run_on_cpu

            if cpu_wanted(device):
                run_on_cpu()
        if planned:
            from megatron_mosaic.host.attach import attached_to_script

            scope.enter_context(attached_to_script())
        runpy.run_path(str(script), run_name="__main__")


def _check_one_megatron(script: Path) -> None:
    """Refuses a Megatron of two sources: ``megatron`` is a namespace package and would mix them.

    Raises:
        HostError: Packages of ``megatron`` would be loaded from different places.
    """
    import importlib

    folder = str(script.resolve().parent)
    sys.path.insert(0, folder)
    try:
        places = [Path(place) for place in importlib.import_module("megatron").__path__]
    except ImportError:
        places = []
    finally:
        sys.path.remove(folder)
    winners = {
        package.name: place
        for place in reversed(places)
        for package in place.glob("*")
        if package.name not in NEIGHBOURS and (package / "__init__.py").is_file()
    }
    if not {"core", "training"} <= set(winners):
        raise HostError(
            f"run: megatron={sorted(winners)} must include core and training; "
            f"install megatron-core>=0.19.2 or run a script of a checkout"
        )
    if len(set(winners.values())) > 1:
        shown = ", ".join(f"{name} from {place}" for name, place in sorted(winners.items()))
        raise HostError(
            f"run: megatron={shown} must come from one place; "
            f"uninstall megatron-core or remove the other one from the path"
        )


if __name__ == "__main__":
    sys.exit(main())
