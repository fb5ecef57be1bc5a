"""Launches under a plan with NeMo-Run: a plugin that adds the plan to a task."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_mosaic.errors import HostError
from megatron_mosaic.layout.plan import Plan, check_world_size

if TYPE_CHECKING:
    _Plugin = object
else:
    try:
        from nemo_run import Plugin as _Plugin
    except ImportError:
        _Plugin = object

OPTION = "--mosaic-plan"
PARAMETER = "mosaic_plan"
RUNNER = "megatron_mosaic.run"


@dataclass(kw_only=True)
class MosaicPlugin(_Plugin):
    """Runs a task under a plan.

    Args:
        plan_path: Plan file, by a path that the ranks see.
        option: Option that hands the plan to a script.
    """

    plan_path: str
    option: str = OPTION

    def setup(self, task: Any, executor: Any) -> None:
        """Adds the plan to a task, and checks that the executor starts as many ranks as it places.

        Args:
            task: A ``run.Script``, which gets the option and starts under ``megatron_mosaic.run``;
                or a ``run.Partial`` of a function with a parameter ``mosaic_plan``.
            executor: Where the task runs.

        Raises:
            PlanError: The plan cannot be read.
            LayoutError: The executor starts another number of ranks.
            HostError: The task has no place for a plan.
        """
        plan = Plan.load(self.plan_path)
        ranks = ranks_of(executor)
        if ranks is not None:
            check_world_size(plan, ranks, where=self.plan_path)
        if hasattr(task, "args") and hasattr(task, "entrypoint"):
            _add_to_script(task, (self.option, self.plan_path))
        else:
            _add_to_function(task, self.plan_path)


def ranks_of(executor: Any) -> int | None:
    """Ranks that an executor starts; ``None`` where it starts one process, or does not say.

    One process by itself launches the plan's ranks on its machine, see ``megatron_mosaic.run``.

    Source:
        NeMo-Run 0.11.1, nemo_run/core/execution: ``nnodes`` and ``nproc_per_node`` of executors.
    """
    try:
        ranks = executor.nnodes() * executor.nproc_per_node()
    except (AttributeError, NotImplementedError):
        return None
    return ranks if ranks > 1 else None


def _add_to_script(task: Any, option: tuple[str, str]) -> None:
    if not task.path:
        raise HostError(
            "task: inline=... must be absent, for an inline script takes no options; give "
            "run.Script the path of a training script"
        )
    if option[0] in task.args:
        raise HostError(f"task: args={option[0]} must be given once; remove it, or the plugin")
    if task.path != RUNNER:
        task.args.insert(0, task.path)
        task.path, task.m, task.entrypoint = RUNNER, True, "python"
    task.args.extend(option)


def _add_to_function(task: Any, plan_path: str) -> None:
    try:
        setattr(task, PARAMETER, plan_path)
    except (AttributeError, TypeError) as error:
        raise HostError(
            f"task: function must have a parameter {PARAMETER} ({' '.join(str(error).split())}); "
            f"add one, or launch a run.Script"
        ) from None
