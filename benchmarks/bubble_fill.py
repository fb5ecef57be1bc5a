"""How much of the bubble encoder tasks fill, and how few of them are live, in Optimus' setting.

python -m benchmarks.bubble_fill

ViT-22B and GPT-175B (arXiv 2408.03505), simulated with the cost model's times on ``CLUSTER`` and
verified. The paper gives no layout; stated here are those of one replica, of which a run has 48:
TP 8 everywhere, a sample a microbatch, 32 microbatches a step, so 1,536 samples on 3,072 GPUs with
PP 8 and on 1,536 with PP 4. The encoder is on the same ranks.

``3 phases`` is the encoder's forward passes, the language model's pipeline in Megatron's order,
the encoder's backward passes, with the same tasks on the same ranks. No order can take less than
the busiest rank's work, nor than the pipeline alone with one task of the encoder before and one
after it: ``least``. What lies between the two is the fillable bubble, whatever the bound on live
tasks is; ``recovered`` is the part of it by which a schedule is faster than three phases.

``at most`` is the part that any order can recover within the bound. Before a rank's first task of
the language model it can run at most as many forward tasks of the encoder as may be live, and
after its last one as many backward tasks; what these leave of the ways to and from the first
stage it waits. ``live`` is the share of the 32 microbatches whose activations the encoder holds
at most; three phases hold all.

``one task`` is three phases with the whole batch in one task of the encoder and its replicas on
all places of the pipeline: the model says that small tasks of the encoder are bound by launching
kernels, which larger ones are not.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.machine import write_results
from megatron_mosaic.cluster.shipped import load_cluster
from megatron_mosaic.cost.cost_model import CostModel
from megatron_mosaic.cost.sizes import ParallelSizes, TrainingSettings
from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.plan import Plan, ScheduleChoice, ScheduleKind
from megatron_mosaic.model.shipped import load_model
from megatron_mosaic.schedule.build import build_schedule
from megatron_mosaic.schedule.fill import fill
from megatron_mosaic.schedule.graph import Stage
from megatron_mosaic.schedule.program import program_of
from megatron_mosaic.schedule.schedule import Schedule
from megatron_mosaic.schedule.simulate import PassTimes, Timeline, simulate
from megatron_mosaic.schedule.steps import Edge
from megatron_mosaic.schedule.task import Task
from megatron_mosaic.schedule.verify import verify

MODEL, CLUSTER = "vit-22b-gpt-175b", "h100"
TP, NUM_MICROBATCHES = 8, 32


class Setting(NamedTuple):
    """Layout of one replica.

    Args:
        pp: Pipeline places of the language model.
        virtual: Its stages on a rank.
        encoder_dp: Replicas of the encoder.
        encoder_pp: Pipeline places of each.
        chunks: Stages of the encoder on a rank.
        group: Microbatches of an encoder task.
        max_live: Bound on live tasks of an encoder stage.
    """

    pp: int
    virtual: int
    encoder_dp: int
    encoder_pp: int
    chunks: int
    group: int
    max_live: int | None = None


SETTINGS = (
    Setting(8, 1, 8, 1, 1, 8),
    Setting(8, 1, 8, 1, 8, 8),
    Setting(8, 1, 8, 1, 16, 8),
    Setting(8, 2, 8, 1, 8, 8),
    # An encoder whose pipeline follows the language model's overlaps with it by itself.
    Setting(8, 1, 1, 8, 1, 4),
    Setting(4, 1, 4, 1, 4, 4),
    Setting(4, 1, 4, 1, 8, 4, 3),
    Setting(8, 2, 8, 1, 8, 8, 2),
    # Live at most a quarter of what three phases hold. With PP 8 that is the 8 microbatches which
    # the language model alone has in flight: little can be filled, and the pipeline drains.
    Setting(8, 1, 1, 8, 1, 1, 8),
    Setting(4, 1, 4, 1, 1, 4, 2),
    Setting(4, 1, 4, 1, 8, 4, 2),
    Setting(4, 2, 4, 1, 8, 4, 2),
    Setting(4, 2, 4, 1, 16, 4, 2),
    Setting(4, 3, 4, 1, 16, 4, 2),
)

Times = tuple[dict[Stage, PassTimes], dict[Edge, float]]


def plan_of(setting: Setting, kind: ScheduleKind, group: int | None = None) -> Plan:
    """One replica; without encoder for the kinds that do not share ranks."""
    ranks = tuple(range(TP * setting.pp))
    modules = {
        "language": ModulePlacement(
            name="language",
            ranks=ranks,
            tensor_model_parallel_size=TP,
            pipeline_model_parallel_size=setting.pp,
            virtual_pipeline_model_parallel_size=setting.virtual,
        )
    }
    alone = kind in ("1f1b", "interleaved")
    if not alone:
        modules["vision"] = ModulePlacement(
            name="vision",
            ranks=ranks,
            tensor_model_parallel_size=TP,
            data_parallel_size=setting.encoder_dp,
            pipeline_model_parallel_size=setting.encoder_pp,
            virtual_pipeline_model_parallel_size=setting.chunks,
        )
    bound = setting.max_live if kind == "bubble_fill" else None
    return Plan(
        world_size=len(ranks),
        global_batch_size=NUM_MICROBATCHES,
        micro_batch_size=1,
        modules=modules,
        edges=() if alone else (("vision", "language"),),
        schedule=ScheduleChoice(kind=kind, encoder_group=group, max_live=bound),
    )


def times_of(costs: CostModel, setting: Setting) -> Times:
    """Times of all tasks, and of a microbatch's hops."""
    tasks_s: dict[Stage, PassTimes] = {}
    transfers_s: dict[Edge, float] = {}
    for name, num_stages, samples in (
        ("vision", setting.encoder_pp * setting.chunks, setting.group / setting.encoder_dp),
        ("language", setting.pp * setting.virtual, 1),
    ):
        sizes = ParallelSizes(tp=TP, pp=num_stages, sequence_parallel=name == "language")
        stages = costs.stages(costs.module(name, sizes, samples=samples))
        group = setting.group if name == "vision" else 1
        for number, stage in enumerate(stages):
            tasks_s[Stage(name, number)] = PassTimes(stage.forward_s, stage.backward_s)
            if number and (name == "language" or setting.encoder_pp > 1):
                edge = Edge(name, number - 1, name, number)
                transfers_s[edge] = stages[number - 1].hop_s / group
    # Into the language model go about as many rows as between its stages.
    last = setting.encoder_pp * setting.chunks - 1
    hop_s = transfers_s[Edge("language", 0, "language", 1)]
    transfers_s[Edge("vision", last, "language", 0)] = hop_s
    return tasks_s, transfers_s


def timeline_of(plan: Plan, schedule: Schedule, times: Times) -> Timeline:
    """Simulates a verified schedule."""
    verify(plan, schedule)
    return simulate(program_of(plan, schedule), tasks_s=times[0], transfers_s=times[1])


def three_phases(plan: Plan, filled: Schedule, alone: Schedule) -> Schedule:
    """A schedule's tasks of the encoder before and after the language model alone."""

    def key(task: Task) -> tuple[int, int]:
        return task.microbatches[0], task.stage if task.kind == "F" else -task.stage

    tasks = []
    for own, language in zip(filled.tasks, alone.tasks, strict=True):
        passes = {
            kind: [t for t in own if t.module == "vision" and t.kind == kind] for kind in "FB"
        }
        tasks.append((*sorted(passes["F"], key=key), *language, *sorted(passes["B"], key=key)))
    return Schedule(
        num_microbatches=plan.num_microbatches,
        forward_only=False,
        tasks=tuple(tasks),
        receives_early=True,
    )


def compare(costs: CostModel, setting: Setting) -> dict[str, Any]:
    """A setting's times beside three phases and the least possible."""
    times = times_of(costs, setting)
    alone_plan = plan_of(setting, "1f1b" if setting.virtual == 1 else "interleaved")
    alone = build_schedule(alone_plan)
    alone_s = timeline_of(alone_plan, alone, times).makespan_s
    plan = plan_of(setting, "bubble_fill", setting.group)
    schedule = fill(plan, tasks_s=times[0], transfers_s=times[1])
    timeline = timeline_of(plan, schedule, times)
    unbounded = plan_of(setting._replace(max_live=None), "bubble_fill", setting.group)
    three_s = timeline_of(unbounded, three_phases(unbounded, schedule, alone), times).makespan_s
    passes = [sum(times[0][stage]) for stage in times[0] if stage.module == "vision"]
    busiest_s = max(timeline.busy_s(kind) for kind in timeline.program.kinds)
    least_s = max(busiest_s, alone_s + sum(passes))
    bound_s = max(least_s, _least_with_bound_s(setting, timeline, times))
    live = max(timeline.program.peak_live(Stage("vision", stage)) for stage in range(len(passes)))
    return {
        **setting._asdict(),
        "language_alone_s": alone_s,
        "busiest_rank_s": busiest_s,
        "least_s": least_s,
        "least_with_bound_s": bound_s,
        "three_phases_s": three_s,
        "one_task_s": _one_task_s(costs, setting, alone_s),
        "bubble_fill_s": timeline.makespan_s,
        "recovered": (three_s - timeline.makespan_s) / (three_s - least_s),
        "recovered_at_most": (three_s - bound_s) / (three_s - least_s),
        "longer_than_three_phases": timeline.makespan_s / three_s - 1,
        "live_microbatches": live * setting.group,
        "live_of_three_phases": live * setting.group / NUM_MICROBATCHES,
    }


def _least_with_bound_s(setting: Setting, timeline: Timeline, times: Times) -> float:
    """Time below which no order can be that keeps to the bound on live tasks."""
    tasks_s, transfers_s = times
    live = setting.max_live or NUM_MICROBATCHES // setting.group
    chunks = [tasks_s[stage] for stage in tasks_s if stage.module == "vision"]
    hop_s = transfers_s[Edge("vision", len(chunks) - 1, "language", 0)]
    # What a rank has of the encoder's tasks, and how long the way through all of them is.
    own_s = [
        max(
            sum(own)
            for own in (passes[place :: setting.encoder_pp] for place in range(setting.encoder_pp))
        )
        for passes in zip(*chunks, strict=True)
    ]
    ways_s = [sum(passes) + hop_s for passes in zip(*chunks, strict=True)]
    least_s = 0.0
    for place in range(setting.pp):
        (kind,) = (k for k in timeline.program.kinds if Stage("language", place) in k.stages)
        waits_s = (max(way - live * own, 0.0) for way, own in zip(ways_s, own_s, strict=True))
        least_s = max(least_s, timeline.busy_s(kind) + sum(waits_s))
        hop_s = (
            transfers_s[Edge("language", place, "language", place + 1)]
            if place + 1 < setting.pp
            else 0.0
        )
        ways_s = [
            way + own + hop_s
            for way, own in zip(ways_s, tasks_s[Stage("language", place)], strict=True)
        ]
    return least_s


def _one_task_s(costs: CostModel, setting: Setting, alone_s: float) -> float:
    """Three phases with the whole batch in one task of the encoder, a replica on every place."""
    samples = NUM_MICROBATCHES / setting.pp
    (stage,) = costs.stages(costs.module("vision", ParallelSizes(tp=TP), samples=samples))
    return alone_s + stage.forward_s + stage.backward_s


def _lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield (
        "PP virtual  encoder DP PP chunks group bound   alone  least  3 phases one task  filled  "
        "recovered at most  longer  live"
    )
    for row in rows:
        yield (
            f"{row['pp']:2} {row['virtual']:7}  {row['encoder_dp']:10} {row['encoder_pp']:2} "
            f"{row['chunks']:6} {row['group']:5} {row['max_live'] or '-':>5}  "
            f"{row['language_alone_s']:6.3f} {row['least_s']:6.3f}  {row['three_phases_s']:8.3f} "
            f"{row['one_task_s']:8.3f}  {row['bubble_fill_s']:6.3f}  {row['recovered']:9.1%} "
            f"{row['recovered_at_most']:7.1%}  "
            f"{row['longer_than_three_phases']:+6.1%}  {row['live_of_three_phases']:4.0%}"
        )


def main() -> None:
    """Prints all settings and writes them."""
    costs = CostModel(load_model(MODEL), load_cluster(CLUSTER), TrainingSettings())
    rows = [compare(costs, setting) for setting in SETTINGS]
    print(f"{MODEL} on {CLUSTER}, TP {TP}, {NUM_MICROBATCHES} microbatches; times in s")
    print("\n".join(_lines(rows)))
    results = {"model": MODEL, "cluster": CLUSTER, "tp": TP, "settings": rows}
    print(write_results("bubble_fill", results))


if __name__ == "__main__":
    main()
