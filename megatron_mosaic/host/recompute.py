"""Recomputation of activations, for each module as the plan says."""

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mosaic.errors import HostError, PlanError
from megatron_mosaic.layout.placement import ModulePlacement, Recompute
from megatron_mosaic.layout.plan import Plan

# Megatron's fields for each word of a plan; full keeps the input of every layer, no more.
SETTINGS: Mapping[Recompute, Mapping[str, Any]] = {
    "selective": {
        "recompute_granularity": "selective",
        "recompute_method": None,
        "recompute_num_layers": None,
        "recompute_modules": ["core_attn"],
    },
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
        "recompute_modules": ["core_attn"],
    },
}


def check_recompute(args: argparse.Namespace, plan: Plan) -> None:
    """Checks that plan and arguments do not ask for different recomputation.

    Args:
        args: Megatron's arguments, before it validates them.
        plan: The plan; modules that say nothing follow the arguments, through the script.

    Raises:
        PlanError: They differ.
        HostError: Another option excludes recomputation.
    """
    given = {name: getattr(args, name, None) for name in SETTINGS["full"]}
    if getattr(args, "recompute_activations", False):
        given["recompute_granularity"] = "selective"
    for name, placement in plan.modules.items():
        if placement.recompute is None:
            continue
        for option, planned in SETTINGS[placement.recompute].items():
            if given[option] not in (None, planned):
                raise PlanError(
                    f"arguments: {option}={given[option]} must equal {planned}, as modules.{name}: "
                    f"recompute={placement.recompute} means; remove the option or change the plan"
                )
        if getattr(args, "cpu_offloading_num_layers", 0):
            raise HostError(
                f"arguments: cpu_offloading_num_layers={args.cpu_offloading_num_layers} must be 0 "
                f"with modules.{name}: recompute={placement.recompute}; remove one of the two"
            )


def set_recompute(config: TransformerConfig, placement: ModulePlacement) -> None:
    """Makes a module's config say what the plan says; without a word there it stays."""
    if placement.recompute is not None:
        vars(config).update(SETTINGS[placement.recompute])


def keep_gradients_of_recomputed(module: torch.nn.Module) -> None:
    """Marks the input of every transformer block that recomputes, where nothing before it trains.

    A checkpointed function whose tensor inputs need no gradient has no backward pass, and the
    weights in it get none, without a word. That is so behind frozen embeddings, where a
    microbatch has no image, and in an encoder whose first layer is frozen.

    Note:
        Frozen layers before the first trainable one of the block then compute the gradient of
        their input, for the host checkpoints every layer alike.
    """
    for block in module.modules():
        if isinstance(block, TransformerBlock) and _checkpoints_weights(block.config):
            block.register_forward_pre_hook(_mark_input, with_kwargs=True)


def _checkpoints_weights(config: TransformerConfig) -> bool:
    """Whether weights lie in what is recomputed: the attention operator has none."""
    if config.recompute_granularity == "selective":
        return set(config.recompute_modules or ()) != {"core_attn"}
    return config.recompute_granularity is not None


def _mark_input(
    block: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    hidden = named.get("hidden_states", inputs[0] if inputs else None)
    if (
        isinstance(hidden, torch.Tensor)
        and not hidden.requires_grad
        and torch.is_grad_enabled()
        and any(parameter.requires_grad for parameter in block.parameters())
    ):
        marked = hidden.detach().requires_grad_()
        if "hidden_states" in named:
            return inputs, named | {"hidden_states": marked}
        return (marked, *inputs[1:]), named
    return None
