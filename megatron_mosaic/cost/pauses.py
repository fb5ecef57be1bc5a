"""Time of a pipeline that pauses for encoders on its ranks, from a few of its groups."""

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from megatron_mosaic.cost.costs import ModuleInStep
from megatron_mosaic.layout.placement import LANGUAGE, ModulePlacement
from megatron_mosaic.layout.plan import Plan, ScheduleChoice
from megatron_mosaic.schedule.graph import Stage
from megatron_mosaic.schedule.plan_program import program_of_plan
from megatron_mosaic.schedule.program import Program
from megatron_mosaic.schedule.simulate import PassTimes, simulate
from megatron_mosaic.schedule.steps import Edge

# More tasks than these take longer than an estimate should (about a third of a microsecond
# each, benchmarks/simulate_speed.py), and pauses so far apart cost hardly more than themselves.
MAX_TASKS = 1500

# Groups beyond those that fill the pipeline, after which one is like the next.
_GROUPS_TO_SETTLE = 3


class _Shape(NamedTuple):
    """What the tasks of a module in such a pipeline depend on."""

    name: str
    num_stages: int
    shared: bool
    trains: bool


def paused_pipeline_s(
    modules: Mapping[str, ModuleInStep], *, group: int, num_microbatches: int
) -> float | None:
    """Simulates the first groups of ``colocated`` and adds the others, each like the last.

    All ranks wait for each other when an encoder's task begins. How much that costs depends on
    where every rank stands just then, which no chain of tasks through the whole step tells.

    Args:
        modules: The language model, and encoders that feed it.
        group: Microbatches of one encoder task.
        num_microbatches: Microbatches of the step.

    Returns:
        Seconds, or None if even the first groups have too many tasks.
    """
    num_stages = len(modules[LANGUAGE].stages)
    num_groups = num_microbatches // group
    simulated = min(num_groups, -(-num_stages // group) + _GROUPS_TO_SETTLE)
    if 2 * simulated * group * num_stages > MAX_TASKS or num_groups * group != num_microbatches:
        return None
    shapes = tuple(
        _Shape(name, len(module.stages), module.shared, bool(module.stages[-1].backward_s))
        for name, module in sorted(modules.items())
    )
    program = _program(shapes, group, simulated * group)
    timeline = simulate(
        program,
        tasks_s={
            Stage(name, s): PassTimes(stage.forward_s, stage.backward_s)
            for name, module in modules.items()
            for s, stage in enumerate(module.stages)
        },
        transfers_s={edge: _transfer_s(modules, edge, group) for edge in program.edges},
    )
    if simulated == num_groups:
        return timeline.makespan_s
    shared = next(name for name, module in modules.items() if module.shared)
    starts_s = timeline.start_s[
        (program.tasks.stage == program.stages.index(Stage(shared, 0)))
        & (program.tasks.backward == 0)
    ]
    return timeline.makespan_s + (num_groups - simulated) * float(starts_s[-1] - starts_s[-2])


def _transfer_s(modules: Mapping[str, ModuleInStep], edge: Edge, group: int) -> float:
    """Time of one microbatch on an edge."""
    hop_s = modules[edge.source].stages[edge.source_stage].hop_s
    if edge.source != LANGUAGE:
        hop_s /= group
    return hop_s if edge.source == edge.destination else modules[LANGUAGE].entry_s or hop_s


@lru_cache(maxsize=512)
def _program(shapes: tuple[_Shape, ...], group: int, num_microbatches: int) -> Program:
    """Tasks of a plan with one rank for each stage of the language model."""
    depth = next(shape.num_stages for shape in shapes if shape.name == LANGUAGE)
    placements, first = {}, depth
    for name, num_stages, shared, trains in shapes:
        ranks = range(depth if shared else num_stages)
        if not shared and name != LANGUAGE:
            ranks = range(first, first + num_stages)
            first += num_stages
        placements[name] = ModulePlacement(
            name=name,
            ranks=tuple(ranks),
            data_parallel_size=depth if shared else 1,
            pipeline_model_parallel_size=1 if shared else num_stages,
            trainable=None if trains else (),
        )
    plan = Plan(
        world_size=first,
        global_batch_size=num_microbatches,
        micro_batch_size=1,
        modules=placements,
        edges=tuple((name, LANGUAGE) for name in placements if name != LANGUAGE),
        schedule=ScheduleChoice(kind="colocated", encoder_group=group),
    )
    return program_of_plan(plan)
