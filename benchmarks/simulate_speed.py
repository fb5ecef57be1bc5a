"""Time to simulate a step, from the plan to the end of every task."""

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

REPEATS = 15


class Case(NamedTuple):
    """A step to simulate.

    Args:
        name: What it is.
        num_stages: Pipeline stages of the language model.
        num_microbatches: Microbatches.
        replicas: Ranks of each stage.
        encoder_group: Microbatches of a task of an encoder on all ranks; None is no encoder.
        virtual: Stages on a rank; more than one is interleaved.
        fills: Whether the encoder's tasks fill bubbles, in the order that the plan holds.
    """

    name: str
    num_stages: int
    num_microbatches: int
    replicas: int = 1
    encoder_group: int | None = None
    virtual: int = 1
    fills: bool = False


CASES = (
    Case("8 stages, 64 microbatches", 8, 64),
    Case("64 stages, 256 microbatches", 64, 256),
    Case("64 stages, 512 microbatches", 64, 512),
    Case("16 stages of 1,024 ranks, 256 microbatches", 16, 256, replicas=1024),
    Case("64 stages, 256 microbatches, encoder in groups of 8", 64, 256, encoder_group=8),
    Case("16 ranks of 4 stages, 512 microbatches", 16, 512, virtual=4),
    Case("64 stages, 512 microbatches, encoder fills", 64, 512, encoder_group=8, fills=True),
    Case("16 stages of 256 ranks, encoder fills", 16, 64, 256, encoder_group=8, fills=True),
)


def main() -> None:
    """Measures all cases, prints them and writes them."""
    rows = [{"case": case.name, **_measure(case)} for case in CASES]
    for row in rows:
        print(
            f"{row['case']:52}  {row['num_tasks']:6} tasks  program {row['program_ms']:6.2f} ms"
            f"  simulation {row['simulation_ms']:6.2f} ms"
            f"  medians {row['program_median_ms']:6.2f} + {row['simulation_median_ms']:6.2f} ms"
        )
    print(write_results("simulate_speed", {"repeats": REPEATS, "cases": rows}))


def _measure(case: Case) -> dict[str, float]:
    plan = _plan(case)
    program = program_of_plan(plan)
    tasks_s = {stage: PassTimes(1.0, 2.0) for stage in stage_order(plan)}
    transfers_s = dict.fromkeys(program.edges, 0.1)
    return {
        "num_tasks": len(program.tasks.stage),
        **_times_ms("program", lambda: program_of_plan(plan)),
        **_times_ms(
            "simulation", lambda: simulate(program, tasks_s=tasks_s, transfers_s=transfers_s)
        ),
    }


def _times_ms(name: str, run: Callable[[], object]) -> dict[str, float]:
    """Best of several times, as other processes share the machine, and their median."""
    times_s = []
    for _ in range(REPEATS):
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
    plan = Plan(
        world_size=len(ranks),
        global_batch_size=case.num_microbatches * case.replicas,
        micro_batch_size=1,
        modules=modules,
        edges=edges,
        schedule=schedule,
    )
    if case.fills:
        order = write_order(plan, build_schedule(plan))
        plan = replace(plan, schedule=replace(schedule, order=order))
    return plan


if __name__ == "__main__":
    main()
