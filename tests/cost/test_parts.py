from dataclasses import replace

import pytest

from megatron_mosaic.cluster.shipped import load_cluster
from megatron_mosaic.cost.cost_model import CostModel
from megatron_mosaic.cost.costs import ModuleCosts, PartCosts, PartRun
from megatron_mosaic.cost.exposed import waited_s
from megatron_mosaic.cost.imbalance import slowed
from megatron_mosaic.cost.sizes import ParallelSizes, TrainingSettings
from megatron_mosaic.cost.stages import StageWork, backward_s, stage_costs
from megatron_mosaic.model.shipped import load_model

PART = PartCosts(
    forward_s=1.0, input_gradient_s=1.1, weight_gradient_s=0.9, recompute_s=0.2, trainable=1.0
)
SETTINGS = TrainingSettings()
FROZEN = replace(PART, trainable=0.0)


def test_trained_part_has_all_gradients():
    assert backward_s(PART, upstream=False) == pytest.approx(0.9 + 1.1 + 0.2)


def test_frozen_part_with_nothing_trained_before_it_has_no_backward():
    assert backward_s(FROZEN, upstream=False) == 0.0


def test_frozen_part_behind_a_trained_one_passes_gradients_on():
    assert backward_s(FROZEN, upstream=True) == pytest.approx(1.1 + 0.2)


def test_adapters_add_their_share_of_the_gradients_of_weights():
    adapted = replace(PART, trainable=0.01)

    assert backward_s(adapted, upstream=False) == pytest.approx(0.009 + 1.1 + 0.2)


MOVING = PartCosts(
    forward_s=1.0,
    input_gradient_s=1.0,
    weight_gradient_s=1.0,
    recompute_s=1.0,
    forward_bytes=10.0,
    input_gradient_bytes=20.0,
    weight_gradient_bytes=40.0,
    recompute_bytes=10.0,
    forward_host_s=0.1,
    backward_host_s=0.25,
)


def test_stage_moves_what_its_passes_do():
    frozen = replace(MOVING, trainable=0.0)
    # The first part needs no backward pass, the second all of it, the third no gradient of
    # weights: 20 + 40 + 10 and 20 + 10.
    work = StageWork(parts=(frozen, MOVING, frozen), upstream=False)
    module = ModuleCosts(name="m", sizes=ParallelSizes(), input=FROZEN, layers=(), output=FROZEN)

    found = stage_costs(work, module=module, cluster=load_cluster("h100"), settings=SETTINGS)

    assert (found.forward_bytes, found.backward_bytes) == (30.0, 100.0)
    assert (found.forward_host_s, found.backward_host_s) == pytest.approx((0.3, 0.5))


def test_slowest_replica_moves_as_much_more():
    costs = ModuleCosts(
        name="m", sizes=ParallelSizes(), input=FROZEN, layers=(PartRun(1, MOVING),), output=FROZEN
    )

    slow = slowed(costs, imbalance=1.5).layers[0].costs

    assert (slow.forward_bytes, slow.weight_gradient_bytes) == (15.0, 60.0)
    assert slow.forward_host_s == MOVING.forward_host_s  # as many kernels


def test_communication_waits_for_what_no_computation_hides():
    # 2 of 5 seconds are left; 3 hidden ones cost a tenth.
    assert waited_s(5.0, behind_s=3.0, cost=0.1) == pytest.approx(2.3)


def layer_of(name, cluster="h100", settings=None, samples=1.0, **sizes):
    model = CostModel(load_model(name), load_cluster(cluster), settings)
    return model.module("language", ParallelSizes(**sizes), samples=samples).layers[0].costs


def test_layer_moves_no_less_than_its_weights():
    # Llama 3 8B: 218.1 million weights a layer, in 2 bytes; gradients of weights are read and
    # written in 4 bytes.
    layer = layer_of("llama-3-8b")

    assert layer.forward_bytes > 2 * 218.1e6
    assert layer.weight_gradient_bytes > 8 * 218.1e6
    assert layer_of("llama-3-8b", recompute="full").recompute_bytes == layer.forward_bytes
    assert layer.forward_bytes / 3.35e12 < layer.forward_s  # an H100 moves 3.35 TB/s


def test_host_launches_what_no_graph_does():
    # An operation each for queries and keys, attention, its output, and both of the MLP; an RMS
    # norm and the like are counted with them.
    gpu = load_cluster("h100").gpu
    layer = layer_of("llama-3-8b")

    assert layer.forward_host_s == pytest.approx(5 * gpu.host_operation_s)
    assert layer.backward_host_s == pytest.approx(1.5 * layer.forward_host_s)
    again = layer_of("llama-3-8b", recompute="full")
    assert again.backward_host_s == pytest.approx(2.5 * layer.forward_host_s)
    graphs = layer_of("llama-3-8b", settings=TrainingSettings(cuda_graph="full"))
    assert graphs.forward_host_s == graphs.backward_host_s == 0.0


def test_host_launches_every_expert():
    gpu = load_cluster("h100").gpu
    alone, split = (layer_of("mixtral-8x7b", ep=ep).forward_host_s for ep in (1, 8))

    # Seven of eight experts are elsewhere.
    assert alone - split == pytest.approx(7 * gpu.host_expert_s["bf16"])


def test_full_recomputation_runs_the_forward_pass_again():
    layer = layer_of("llama-3-8b", recompute="full")

    assert layer.recompute_s == layer.forward_s


def test_selective_recomputation_runs_attention_alone_again():
    layer = layer_of("llama-3-8b", recompute="selective")

    assert 0 < layer.recompute_s < 0.3 * layer.forward_s


def test_tensor_parallelism_exposes_communication():
    alone, split = (layer_of("llama-3-70b", tp=tp, sequence_parallel=tp > 1) for tp in (1, 8))

    assert alone.forward_communication_s == 0.0
    assert split.forward_communication_s > 0
    assert alone.forward_s / 8 < split.forward_s < alone.forward_s


def test_tensor_parallelism_over_nodes_is_slower():
    inside, outside = (
        layer_of("llama-3-70b", tp=tp, sequence_parallel=True).forward_communication_s
        for tp in (8, 16)
    )

    assert outside > inside


def test_low_precision_is_faster():
    model, cluster = load_model("llama-3-70b"), load_cluster("b200")

    bf16, fp8 = (
        CostModel(replace(model, precision=precision), cluster)
        .module("language", ParallelSizes(), samples=1)
        .layers[0]
        .costs.forward_s
        for precision in ("bf16", "fp8")
    )
    assert 0.4 < fp8 / bf16 < 0.9


def test_flex_dispatch_sends_less_than_one_copy_for_each_expert():
    waits = [
        layer_of(
            "qwen3-235b-a22b",
            settings=TrainingSettings(moe_dispatcher=dispatcher, cuda_graph="full"),
            ep=32,
        ).forward_communication_s
        for dispatcher in ("alltoall", "flex")
    ]

    assert waits[1] < 0.5 * waits[0]


def test_host_bounds_small_layers_without_graphs():
    slow, fast = (
        layer_of("llama-3-8b", settings=TrainingSettings(cuda_graph=graph), samples=0.01)
        for graph in ("none", "full")
    )

    # Four multiplications and attention, 0.4 ms each.
    assert slow.forward_s == pytest.approx(5 * 0.4e-3, rel=0.25)
    assert fast.forward_s < 0.3 * slow.forward_s


def test_frozen_model_has_a_cheaper_step():
    model, cluster = load_model("llama-3-8b"), load_cluster("h100")
    frozen = replace(
        model, modules={"language": replace(model.language, trainable=("output_layer",))}
    )

    whole, part = (
        costs.stages(costs.module("language", ParallelSizes(dp=8), samples=1))[0]
        for costs in (CostModel(it, cluster) for it in (model, frozen))
    )
    assert part.forward_s == whole.forward_s
    # Nothing below the head needs a gradient.
    assert part.backward_s < 0.15 * whole.backward_s
    assert part.optimizer_s < 0.1 * whole.optimizer_s
