"""Time to build, to prepare, to verify and to simulate a step, each apart."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from benchmarks.machine import write_results
from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.plan import Plan, ScheduleChoice, ScheduleKind
from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.graph import stage_order
from megatron_mosaic.schedule.order import write_order
from megatron_mosaic.schedule.plan_program import program_of_plan
from megatron_mosaic.schedule.simulate import PassTimes, simulate
from megatron_mosaic.schedule.verify import verify

REPEATS = 15
BUILD_REPEATS = 3  # what takes seconds
PARTS = ("build", "program", "verify", "simulation")


class Case(NamedTuple):
    """A step to simulate.

    Args:
        name: What it is.
        num_stages: Pipeline stages of the language model.
        num_microbatches: Microbatches.
        replicas: Ranks of each stage.
        encoder_group: Microbatches of a task of an encoder on all ranks; None is no encoder.
        virtual: Stages on a rank; more than one is interleaved.
        fills: Whether the encoder's tasks fill bubbles.
    """

    name: str
    num_stages: int
    num_microbatches: int
    replicas: int = 1
    encoder_group: int | None = None
    virtual: int = 1
    fills: bool = False


CASES = (
    Case("1f1b: 8 stages, 64 microbatches", 8, 64),
    Case("1f1b: 64 stages, 512 microbatches", 64, 512),
    Case("1f1b: 4,096 ranks in 16 stages, 256 microbatches", 16, 256, replicas=256),
    Case("colocated: 64 stages, 512 microbatches, groups of 8", 64, 512, encoder_group=8),
    Case("interleaved: 32 ranks of 2 stages, 512 microbatches", 32, 512, virtual=2),
    Case("interleaved: 16 ranks of 4 stages, 512 microbatches", 16, 512, virtual=4),
    Case("interleaved: 4,096 ranks in 16 places, 2 stages each", 16, 256, 256, virtual=2),
    Case("bubble_fill: 64 stages, 512 microbatches, groups of 8", 64, 512, 1, 8, fills=True),
    Case("bubble_fill: 4,096 ranks in 16 stages, groups of 8", 16, 64, 256, 8, fills=True),
)


def main() -> None:
    """Measures all cases, prints them and writes them."""
    rows = [{"case": case.name, **_measure(case)} for case in CASES]
    print(f"{'best of several, ms':56}  {'tasks':>6}" + "".join(f"  {part:>10}" for part in PARTS))
    for row in rows:
        times = "".join(f"  {row[f'{part}_ms']:10.2f}" for part in PARTS)
        print(f"{row['case']:56}  {row['num_tasks']:6}{times}")
    print(
        write_results(
            "simulate_speed", {"repeats": REPEATS, "build_repeats": BUILD_REPEATS, "cases": rows}
        )
    )


def _measure(case: Case) -> dict[str, float]:
    plan = _plan(case)
    building = _times_ms("build", lambda: build_schedule(plan), repeats=BUILD_REPEATS)
    schedule = build_schedule(plan)
    if case.fills:
        # What is simulated is a plan that holds its order, as the planner writes it.
        choice = replace(plan.schedule, order=write_order(plan, schedule))
        plan = replace(plan, schedule=choice)
    program = program_of_plan(plan)
    tasks_s = {stage: PassTimes(1.0, 2.0) for stage in stage_order(plan)}
    transfers_s = dict.fromkeys(program.edges, 0.1)
    return {
        "num_tasks": len(program.tasks.stage),
        **building,
        **_times_ms("program", lambda: program_of_plan(plan), repeats=REPEATS),
        **_times_ms("verify", lambda: verify(plan, schedule), repeats=BUILD_REPEATS),
        **_times_ms(
            "simulation",
            lambda: simulate(program, tasks_s=tasks_s, transfers_s=transfers_s),
            repeats=REPEATS,
        ),
    }


def _times_ms(name: str, run: Callable[[], object], *, repeats: int) -> dict[str, float]:
    """Best of several times, as other processes share the machine, and their median."""
    times_s = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        run()
        times_s.append(time.perf_counter() - start_s)
    return {
        f"{name}_ms": 1e3 * min(times_s),
        f"{name}_median_ms": 1e3 * statistics.median(times_s),
    }


def _plan(case: Case) -> Plan:
    ranks = tuple(range(case.num_stages * case.replicas))
    language = ModulePlacement(
        name="language",
        ranks=ranks,
        data_parallel_size=case.replicas,
        pipeline_model_parallel_size=case.num_stages,
        virtual_pipeline_model_parallel_size=case.virtual,
    )
    kind: ScheduleKind = "1f1b" if case.virtual == 1 else "interleaved"
    modules, edges, schedule = {"language": language}, (), ScheduleChoice(kind=kind)
    if case.encoder_group is not None:
        modules["vision"] = ModulePlacement(
            name="vision", ranks=ranks, data_parallel_size=len(ranks)
        )
        edges = (("vision", "language"),)
        kind = "bubble_fill" if case.fills else "colocated"
        schedule = ScheduleChoice(kind=kind, encoder_group=case.encoder_group)
    return Plan(
        world_size=len(ranks),
        global_batch_size=case.num_microbatches * case.replicas,
        micro_batch_size=1,
        modules=modules,
        edges=edges,
        schedule=schedule,
    )


if __name__ == "__main__":
    main()
