"""Time and memory of rehearsals of up to 64 ranks, and of a larger plan that folds to them.

Plans have an encoder on all ranks and a language model in tensor-parallel pipelines, both with
several replicas.
"""

from typing import Any

from benchmarks.machine import write_results
from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.plan import Plan, ScheduleChoice
from megatron_mosaic.rehearsal.fold import fold
from megatron_mosaic.rehearsal.rehearsal import rehearse

MAX_RANKS = {8: 64, 64: 64, 512: 32}  # by world size
TIME_LIMIT_S = 600.0


def plan_of(world_size: int) -> Plan:
    """A plan for any number of ranks."""
    pp = 4 if world_size >= 64 else 2
    tp = 4 if world_size >= 64 else 2
    dp = world_size // (tp * pp)
    return Plan(
        world_size=world_size,
        global_batch_size=4 * pp * dp,
        micro_batch_size=1,
        modules={
            "vision": ModulePlacement(
                name="vision",
                ranks=tuple(range(world_size)),
                tensor_model_parallel_size=tp,
                data_parallel_size=world_size // tp,
            ),
            "language": ModulePlacement(
                name="language",
                ranks=tuple(range(world_size)),
                tensor_model_parallel_size=tp,
                sequence_parallel=True,
                data_parallel_size=dp,
                pipeline_model_parallel_size=pp,
                layers_per_stage=(2, *[1] * (pp - 1)),
            ),
        },
        edges=(("vision", "language"),),
        schedule=ScheduleChoice(kind="bubble_fill", encoder_group=pp),
    )


def measure(plan: Plan) -> dict[str, Any]:
    """Rehearses a plan as the command does."""
    folded = fold(plan, max_ranks=MAX_RANKS[plan.world_size], where="plan")
    result = rehearse(folded.plan, time_limit_s=TIME_LIMIT_S, say=print)
    return {
        "world_size": plan.world_size,
        "ranks": folded.plan.world_size,
        "left_out": folded.notes,
        "passed": result.passed,
        "measures": {finding.subject: finding.measure for finding in result.findings},
        "wall_s": round(result.wall_s, 1),
        "cpu_s": round(result.cpu_s, 1),
        "peak_bytes": result.peak_bytes,
    }


def main() -> None:
    """Measures all plans and writes the results."""
    measured = [measure(plan_of(world_size)) for world_size in MAX_RANKS]
    print(write_results("rehearsal", {"plans": measured}))


if __name__ == "__main__":
    main()
