"""How much of the bubble encoder tasks fill, on Optimus' largest setting, simulated.

python -m benchmarks.bubble_fill

ViT-22B and GPT-175B on 3,072 GPUs with 1,536 samples a step (arXiv 2408.03505). The paper gives no
layout; here the language model is in TP 8, PP 8, DP 48, a sample a microbatch, so 32 microbatches,
and the encoder in the same sizes on the same ranks. One of the 48 equal replicas is simulated, in
1F1B and with two and four stages of the language model on a rank, with the cost model's times on
``CLUSTER``.

``three-phase`` runs the encoder over the whole batch, the language model's pipeline, and the
encoder's backward pass. The fillable bubble is what lies between its time and the least that any
order could take: the language model alone, or the busiest rank's work. Recovered is the part of it
that a schedule is faster than three-phase.
"""

from dataclasses import replace
from typing import Any

from benchmarks.machine import write_results
from megatron_mosaic.cluster.library import load_cluster
from megatron_mosaic.cost.cost_model import CostModel
from megatron_mosaic.cost.sizes import ParallelSizes, TrainingSettings
from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.plan import Plan, ScheduleChoice
from megatron_mosaic.model.library import load_model
from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.fill import fill, least_live
from megatron_mosaic.schedule.graph import Stage
from megatron_mosaic.schedule.program import program_of
from megatron_mosaic.schedule.schedule import Schedule
from megatron_mosaic.schedule.simulate import PassTimes, Timeline, simulate
from megatron_mosaic.schedule.steps import Edge
from megatron_mosaic.schedule.verify import verify

MODEL, CLUSTER = "vit-22b-gpt-175b", "h100"
TP, PP, NUM_MICROBATCHES = 8, 8, 32
VIRTUAL = (1, 2, 4)
Times = tuple[dict[Stage, PassTimes], dict[Edge, float]]


def plan_of(kind: str, virtual: int, **choice: Any) -> Plan:
    """One replica of the setting; without an encoder for the kinds that know none here."""
    sizes = {"tensor_model_parallel_size": TP, "pipeline_model_parallel_size": PP}
    language = ModulePlacement(
        name="language",
        ranks=tuple(range(TP * PP)),
        virtual_pipeline_model_parallel_size=virtual,
        **sizes,
    )
    vision = ModulePlacement(name="vision", ranks=tuple(range(TP * PP)), **sizes)
    alone = kind in ("1f1b", "interleaved")
    return Plan(
        world_size=TP * PP,
        global_batch_size=NUM_MICROBATCHES,
        micro_batch_size=1,
        modules={"language": language} if alone else {"language": language, "vision": vision},
        edges=() if alone else (("vision", "language"),),
        schedule=ScheduleChoice(kind=kind, **choice),  # pyright: ignore[reportArgumentType]
    )


def times_of(virtual: int) -> Times:
    """Times of all tasks and hops by the cost model."""
    costs = CostModel(load_model(MODEL), load_cluster(CLUSTER), TrainingSettings())
    tasks_s: dict[Stage, PassTimes] = {}
    transfers_s: dict[Edge, float] = {}
    for name, chunks in (("vision", 1), ("language", virtual)):
        sizes = ParallelSizes(tp=TP, pp=PP * chunks, sequence_parallel=name == "language")
        stages = costs.stages(name, sizes, samples_per_task=1)
        for number, stage in enumerate(stages):
            tasks_s[Stage(name, number)] = PassTimes(stage.forward_s, stage.backward_s)
            if number:
                transfers_s[Edge(name, number - 1, name, number)] = stages[number - 1].hop_s
    # From the encoder to the language model go as many bytes as between the latter's stages.
    transfers_s[Edge("vision", PP - 1, "language", 0)] = transfers_s[
        Edge("language", 0, "language", 1)
    ]
    return tasks_s, transfers_s


def timeline_of(plan: Plan, schedule: Schedule, times: Times) -> Timeline:
    """Simulates a verified schedule."""
    verify(plan, schedule)
    tasks_s, transfers_s = times
    return simulate(program_of(plan, schedule), tasks_s=tasks_s, transfers_s=transfers_s)


def compare(virtual: int) -> dict[str, Any]:
    """Times of three-phase, of the language model alone, and of bubble_fill by its bound."""
    times = times_of(virtual)
    alone = plan_of("1f1b" if virtual == 1 else "interleaved", virtual)
    alone_s = timeline_of(alone, build_schedule(alone), times).makespan_s
    encoder = timeline_of(*_encoder_in_order(virtual), times)
    passes = [times[0][Stage("vision", stage)] for stage in range(PP)]
    # Each rank runs one stage of the encoder, one microbatch after the other.
    three_phase_s = alone_s + _pipelined_s(passes)
    busiest_s = max(encoder.busy_s(kind) for kind in encoder.program.kinds)
    fillable_s = three_phase_s - max(alone_s, busiest_s)
    least = least_live(plan_of("bubble_fill", virtual))
    rows = []
    for bound in sorted({least, NUM_MICROBATCHES // 4, *range(8, NUM_MICROBATCHES + 1, 4)}):
        if bound >= least:
            plan = plan_of("bubble_fill", virtual, max_live=bound)
            schedule = fill(plan, tasks_s=times[0], transfers_s=times[1])
            timeline = timeline_of(plan, schedule, times)
            rows.append(
                {
                    "max_live": bound,
                    "step_s": timeline.makespan_s,
                    "recovered": (three_phase_s - timeline.makespan_s) / fillable_s,
                    "live_of_three_phase": max(
                        timeline.program.peak_live(Stage("vision", stage)) for stage in range(PP)
                    )
                    / NUM_MICROBATCHES,
                    "longer_than_three_phase": timeline.makespan_s / three_phase_s - 1,
                }
            )
    return {
        "stages_per_rank": virtual,
        "language_alone_s": alone_s,
        "three_phase_s": three_phase_s,
        "busiest_rank_s": busiest_s,
        "fillable_s": fillable_s,
        "bounds": rows,
    }
