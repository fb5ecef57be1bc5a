from dataclasses import replace

import pytest

from megatron_mosaic.cluster.shipped import load_cluster
from megatron_mosaic.cost.cost_model import CostModel
from megatron_mosaic.cost.costs import PartCosts
from megatron_mosaic.cost.exposed import waited_s
from megatron_mosaic.cost.sizes import ParallelSizes, TrainingSettings
from megatron_mosaic.cost.stages import backward_s
from megatron_mosaic.model.shipped import load_model

PART = PartCosts(
    forward_s=1.0, input_gradient_s=1.1, weight_gradient_s=0.9, recompute_s=0.2, trainable=1.0
)
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


def test_communication_waits_for_what_no_computation_hides():
    # 2 of 5 seconds are left; 3 hidden ones cost a tenth.
    assert waited_s(5.0, behind_s=3.0, cost=0.1) == pytest.approx(2.3)


def layer_of(name, cluster="h100", settings=None, samples=1.0, **sizes):
    model = CostModel(load_model(name), load_cluster(cluster), settings)
    return model.module("language", ParallelSizes(**sizes), samples=samples).layers[0].costs


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
