"""How far the closed form of a step is from the simulation of the same step."""

import random
import statistics
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from benchmarks.machine import write_results
from megatron_mosaic.cost.costs import ModuleInStep, StageCosts, StageMemory
from megatron_mosaic.cost.step import step_breakdown
from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.plan import Plan, ScheduleChoice, ScheduleKind
from megatron_mosaic.schedule.graph import Stage
from megatron_mosaic.schedule.plan_program import program_of_plan
from megatron_mosaic.schedule.simulate import PassTimes, simulate

NUM_STEPS = 300


class Setting(NamedTuple):
    """What steps are drawn from.

    Args:
        kind: Schedule.
        shared: Whether encoders run on the language model's ranks; else on their own.
        hop_s: Longest transfer, where the forward pass of a stage takes about a second.
    """

    kind: ScheduleKind
    shared: bool
    hop_s: float


class Step(NamedTuple):
    """A step as a plan, and as the closed form takes it."""

    plan: Plan
    modules: Mapping[str, ModuleInStep]

    def closed_form_s(self) -> float:
        """Time by the closed form."""
        return step_breakdown(
            self.modules,
            edges=self.plan.edges,
            kind=self.plan.schedule.kind,
            num_microbatches=self.plan.num_microbatches,
            encoder_group=self.plan.schedule.encoder_group,
        ).step_s

    def simulated_s(self) -> float:
        """Time by simulation."""
        tasks_s = {
            Stage(name, s): PassTimes(stage.forward_s, stage.backward_s)
            for name, module in self.modules.items()
            for s, stage in enumerate(module.stages)
        }
        program = program_of_plan(self.plan)
        transfers_s = {}
        for edge in program.edges:
            source = self.modules[edge.source]
            hop_s = source.stages[edge.source_stage].hop_s / (source.task_microbatches or 1)
            entry_s = self.modules[edge.destination].entry_s
            transfers_s[edge] = hop_s if edge.source == edge.destination else entry_s or hop_s
        return simulate(program, tasks_s=tasks_s, transfers_s=transfers_s).makespan_s


_PLACES: tuple[tuple[ScheduleKind, bool], ...] = (
    ("no_pipelining", False),
    ("no_pipelining", True),
    ("1f1b", False),
    ("colocated", True),
    ("colocated", False),
)
SETTINGS = tuple(
    Setting(kind, shared, hop_s) for kind, shared in _PLACES for hop_s in (0.0, 0.1, 0.5)
)


def main() -> None:
    """Compares all settings, prints them and writes them."""
    rows = [
        {**setting._asdict(), **deviations(setting, num_steps=NUM_STEPS)} for setting in SETTINGS
    ]
    for row in rows:
        where = "shared" if row["shared"] else "apart"
        print(
            f"{row['kind']:14} {where:6} hops <= {row['hop_s']:.1f} s  "
            f"median {row['median']:8.3%}  90th {row['percentile_90']:8.3%}  "
            f"most {row['most']:8.3%}  {row['closed_form_ms']:.3f} ms"
        )
    print(write_results("step_deviation", {"num_steps": NUM_STEPS, "settings": rows}))


def deviations(setting: Setting, *, num_steps: int, seed: int = 0) -> dict[str, float]:
    """Shares by which the closed form misses the simulation of random steps."""
    drawn = random.Random(seed)
    steps = [draw_step(drawn, setting) for _ in range(num_steps)]
    found, times_s = [], []
    for step in steps:
        step.closed_form_s()  # the programs of a search's steps are mostly known
        start_s = time.perf_counter()
        closed_form_s = step.closed_form_s()
        times_s.append(time.perf_counter() - start_s)
        found.append(closed_form_s / step.simulated_s() - 1)
    sizes = sorted(map(abs, found))
    return {
        "median": statistics.median(sizes),
        "percentile_90": sizes[9 * num_steps // 10],
        "most": sizes[-1],
        "most_too_slow": max(found),
        "closed_form_ms": 1e3 * statistics.median(times_s),
    }


def draw_step(drawn: random.Random, setting: Setting) -> Step:
    """Draws a step: stages that differ by up to a half, encoders of which some are frozen."""
    num_stages = 1 if setting.kind == "no_pipelining" else drawn.randint(1, 10)
    num_microbatches = drawn.choice([4, 8, 12, 16, 32, 64])
    group = None
    if setting.kind == "colocated":
        group = drawn.choice([g for g in (1, 2, 4, 8, 16, 32, 64) if num_microbatches % g == 0])
    stages = _Stages(drawn, setting.hop_s)
    entry_s = 0.0 if setting.shared else drawn.uniform(0, setting.hop_s)
    modules = {
        "language": ModuleInStep(
            name="language", stages=stages.draw(num_stages, 1.0), entry_s=entry_s
        )
    }
    placements = {
        "language": _placement("language", 0, num_stages, pipeline_model_parallel_size=num_stages)
    }
    first = num_stages
    for e in range(drawn.randint(0 if setting.kind == "1f1b" else 1, 2)):
        name, frozen, per_task = f"encoder{e}", drawn.random() < 0.4, group or 1
        depth = drawn.randint(1, 2) if setting.kind != "no_pipelining" and not setting.shared else 1
        forward_s = per_task * drawn.choice([0.05, 0.2, 0.5] if setting.shared else [0.3, 0.8, 1.0])
        modules[name] = ModuleInStep(
            name=name,
            stages=stages.draw(depth, forward_s, frozen=frozen, tasks=per_task),
            shared=setting.shared,
            task_microbatches=per_task,
        )
        trainable = {"trainable": ()} if frozen else {}
        if setting.shared:
            placements[name] = _placement(
                name, 0, num_stages, data_parallel_size=num_stages, **trainable
            )
        else:
            placements[name] = _placement(
                name, first, depth, pipeline_model_parallel_size=depth, **trainable
            )
            first += depth
    plan = Plan(
        world_size=first,
        global_batch_size=num_microbatches,
        micro_batch_size=1,
        modules=placements,
        edges=tuple((name, "language") for name in placements if name != "language"),
        schedule=ScheduleChoice(kind=setting.kind, encoder_group=group),
    )
    return Step(plan, modules)


class _Stages:
    """Draws stages; how unlike they are, and what a backward pass takes, holds for a step."""

    def __init__(self, drawn: random.Random, hop_s: float) -> None:
        self.drawn, self.hop_s = drawn, hop_s
        self.spread = drawn.choice([0.0, 0.2, 0.5])
        self.backward = drawn.uniform(1.0, 3.0)

    def draw(
        self, count: int, forward_s: float, *, frozen: bool = False, tasks: int = 1
    ) -> tuple[StageCosts, ...]:
        """Draws stages of a module, whose tasks have some microbatches."""
        stages = []
        for _ in range(count):
            own_s = forward_s * self.drawn.uniform(1 - self.spread, 1 + self.spread)
            backward_s = own_s * self.backward * self.drawn.uniform(0.9, 1.1)
            stages.append(
                StageCosts(
                    forward_s=own_s,
                    backward_s=0.0 if frozen else backward_s,
                    hop_s=tasks * self.drawn.uniform(0, self.hop_s),
                    memory=StageMemory(),
                )
            )
        return tuple(stages)


def _placement(name: str, first: int, count: int, **fields: Any) -> ModulePlacement:
    return ModulePlacement(name=name, ranks=tuple(range(first, first + count)), **fields)


if __name__ == "__main__":
    main()
