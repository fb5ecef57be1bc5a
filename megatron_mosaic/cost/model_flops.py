"""FLOPs that a model is said to need, whatever its layout: what throughputs are published by."""

from collections.abc import Iterator

from megatron_mosaic.cost.end_operations import input_operations, output_operations
from megatron_mosaic.cost.operations import Operation, TaskTokens, Workplace, layer_operations
from megatron_mosaic.cost.sizes import ParallelSizes, TrainingSettings
from megatron_mosaic.model.parameters import adapter_parameters
from megatron_mosaic.model.spec import ModuleSpec, Part


def model_flops_per_token(module: ModuleSpec, *, full_attention: bool = False) -> float:
    """FLOPs of a training step by token, everything trained: three forward passes.

    Attention's backward pass counts twice its forward, though flash attention computes more, and
    a causal mask halves it.

    Source:
        num_floating_point_operations in Megatron-LM core_v0.19.0, training.py.
    """
    length = module.tokens_per_item.mean_square / module.tokens_per_item.mean
    pairs = length if full_attention or not module.causal else length / 2
    return 3 * forward_flops_per_token(module, pairs_per_token=pairs)


def forward_flops_per_token(module: ModuleSpec, *, pairs_per_token: float | None = None) -> float:
    """FLOPs of a forward pass by token of the module.

    Args:
        module: The module.
        pairs_per_token: Pairs that attention computes by token; the mask's own if absent.
    """
    parts = _parts(module, pairs_per_token)
    return sum(it.flops for _, operations in parts for it in operations) / module.tokens_per_sample


def step_flops_per_token(module: ModuleSpec, *, pairs_per_token: float | None = None) -> float:
    """FLOPs of a training step by token, with gradients of those weights alone that train.

    Adapters of rank ``r`` beside a layer's multiplications are counted with all three passes.

    Args:
        module: The module, and which of its parts train.
        pairs_per_token: Pairs that attention computes by token; the mask's own if absent.

    Source:
        The frozen rule of Cornstarch, arXiv 2503.11367: nothing that is frozen has gradients of
        weights, and it passes gradients on only where something before it trains.
    """
    upstream, total = False, 0.0
    for part, operations in _parts(module, pairs_per_token):
        adapted = part == "layers" and module.adapters_train
        trains = module.trains(part)
        needed = upstream or trains or adapted
        for it in operations:
            passes = 1 + needed * (1 if it.weights else 2) + bool(trains and it.weights)
            total += passes * it.flops
        upstream = needed
    tokens = module.tokens_per_sample
    return total / tokens + 3 * _adapter_flops_per_token(module)


def _adapter_flops_per_token(module: ModuleSpec) -> float:
    if not module.lora_rank:
        return 0.0
    return 2.0 * sum(
        count
        * adapter_parameters(layer, hidden_size=module.hidden_size, lora_rank=module.lora_rank)
        for count, layer in module.layers
    )


def _parts(
    module: ModuleSpec, pairs_per_token: float | None
) -> Iterator[tuple[Part, tuple[Operation, ...]]]:
    tokens = module.tokens_per_sample
    pairs = module.pairs_per_sample if pairs_per_token is None else pairs_per_token * tokens
    place = Workplace(
        hidden_size=module.hidden_size,
        task=TaskTokens(tokens=tokens, pairs=pairs, all_pairs=pairs),
        sizes=ParallelSizes(),
        settings=TrainingSettings(),
        precision="bf16",
    )
    yield "input", input_operations(module, place)
    for count, layer in module.layers:
        yield "layers", layer_operations(layer, place) * count
    yield "output", output_operations(module, place)
