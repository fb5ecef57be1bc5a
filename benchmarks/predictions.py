"""Estimates of published cases."""

import heapq
from dataclasses import replace
from functools import cache
from pathlib import Path

from benchmarks.published_points import Case
from megatron_mosaic.cluster.shipped import load_cluster
from megatron_mosaic.cluster.spec import Cluster
from megatron_mosaic.cost.cost_model import CostModel
from megatron_mosaic.cost.costs import ModuleCosts, ModuleInStep, StageCosts, StepBreakdown
from megatron_mosaic.cost.stages import backward_s
from megatron_mosaic.cost.step import step_breakdown

_load = cache(load_cluster)

_CLUSTERS = {
    "A100": "a100-80g",
    "H100": "h100",
    "H200": "h200",
    "B200": "b200",
    "B300": "b300",
    "GB200": "gb200-nvl72",
    "GB300": "gb300-nvl72",
}


SIMUMAX_MACHINE = Path(__file__).resolve().parent / "data" / "b200_simumax.yaml"


def cluster_of(case: Case) -> Cluster:
    """The cluster of a case, with as many GPUs: a shipped one, or SimuMax's machine."""
    name = str(SIMUMAX_MACHINE) if case.source == "simumax" else _CLUSTERS[case.gpu]
    cluster = _load(name)
    per_node = min(cluster.gpus_per_node, case.num_gpus)
    return replace(cluster, gpus_per_node=per_node, num_nodes=-(-case.num_gpus // per_node))


def predict(case: Case, cluster: Cluster | None = None) -> StepBreakdown:
    """Estimates the step of a case, whose encoders run before the language model's first stage."""
    model = CostModel(case.model, cluster or cluster_of(case), case.settings)
    module = model.module("language", case.sizes, samples=case.micro_batch_size)
    stages = model.stages(module, layers_per_stage(case, module))
    for name in case.model.modules:
        if name != "language":
            sizes = replace(case.sizes, pp=1, chunks=1, ep=1)
            costs = model.module(name, sizes, samples=case.micro_batch_size)
            (encoder,) = model.stages(costs)
            stages = (joined(stages[0], encoder), *stages[1:])
    step = ModuleInStep(name="language", stages=stages, chunks=case.sizes.chunks)
    return step_breakdown(
        {"language": step},
        edges=(),
        kind="1f1b" if case.sizes.pp > 1 else "no_pipelining",
        num_microbatches=case.global_batch_size // (case.micro_batch_size * case.sizes.dp),
    )


def joined(first: StageCosts, second: StageCosts) -> StageCosts:
    """A stage that does what two do, one after the other."""
    return replace(
        first,
        forward_s=first.forward_s + second.forward_s,
        backward_s=first.backward_s + second.backward_s,
        communication_s=first.communication_s + second.communication_s,
        sync_s=first.sync_s + second.sync_s,
        optimizer_s=first.optimizer_s + second.optimizer_s,
        flops=first.flops + second.flops,
    )


def layers_per_stage(case: Case, module: ModuleCosts) -> tuple[int, ...] | None:
    """Layers of stages where they do not divide evenly, which no source states.

    Every layer goes to the stage that is least busy, input and output counted: what the recipes'
    hand-written layouts come close to.
    """
    if module.num_layers % (case.sizes.pp * case.sizes.chunks) == 0 and not (
        case.model.language.output is not None
        and getattr(case.model.language.output, "mtp_layers", 0)
    ):
        return None
    each = list(module.each_layer())
    mean = sum(layer.forward_s + backward_s(layer, upstream=True) for layer in each) / len(each)
    busy = [0.0] * case.sizes.pp
    busy[0] += module.input.forward_s + backward_s(module.input, upstream=False)
    busy[-1] += module.output.forward_s + backward_s(module.output, upstream=True)
    counts = [0] * case.sizes.pp
    heap = [(load, stage) for stage, load in enumerate(busy)]
    heapq.heapify(heap)
    for _ in each:
        load, stage = heapq.heappop(heap)
        counts[stage] += 1
        heapq.heappush(heap, (load + mean, stage))
    return tuple(counts)
