"""Low-rank adapters as a script may have them, and freezing by name."""

import re
from fnmatch import fnmatchcase

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

RANK = 2


class _Projection(MegatronModule):
    """A plain weight that may be split over tensor parallelism.

    Args:
        shape: Of this rank's part.
        split_dim: Dimension along which ranks hold parts of it; -1 if each holds the whole.
        init_method: Draws the weight.
    """

    def __init__(self, shape, *, config, split_dim, init_method):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
        self._split_dim = split_dim
        if split_dim >= 0:
            set_tensor_model_parallel_attributes(self.weight, True, split_dim, 1)
        with torch.no_grad():
            init_method(self.weight)

    def forward(self, hidden):
        return torch.nn.functional.linear(hidden, self.weight)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        split = {"weight": self._split_dim} if self._split_dim >= 0 else {}
        state = {"weight": self.weight}
        groups = {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        return make_sharded_tensors_for_checkpoint(state, prefix, split, sharded_offsets, **groups)


class AdaptedLinear(MegatronModule):
    """A linear layer of Megatron's with a low-rank addition."""

    def __init__(self, linear, *, config, splits_output):
        super().__init__(config)
        rows, columns = linear.weight.shape
        self.to_wrap = linear
        self._splits_output = splits_output
        self.lora_a = _Projection(
            (RANK, columns),
            config=config,
            split_dim=-1 if splits_output else 1,
            init_method=config.init_method,
        )
        self.lora_b = _Projection(
            (rows, RANK),
            config=config,
            split_dim=0 if splits_output else -1,
            init_method=torch.nn.init.zeros_,
        )

    def forward(self, hidden):
        output, bias = self.to_wrap(hidden)
        low = self.lora_a(hidden)
        if self._splits_output:
            low = copy_to_tensor_model_parallel_region(low)
        else:
            low = reduce_from_tensor_model_parallel_region(low)
        return output + self.lora_b(low), bias


def add_adapters(block):
    """Puts adapters around the attention's two linear layers in every layer of a block."""
    for layer in block.layers:
        attention = layer.self_attention
        for name, splits_output in (("linear_qkv", True), ("linear_proj", False)):
            linear = getattr(attention, name)
            adapted = AdaptedLinear(linear, config=block.config, splits_output=splits_output)
            setattr(attention, name, adapted)


def train_only(model, patterns):
    """Freezes everything but parameters with such names; layers count over all stages."""
    numbers = {
        f"{name}.": re.sub(r"\d+$", str(layer.layer_number - 1), name) + "."
        for name, layer in model.named_modules()
        if re.search(r"layers\.\d+$", name)
    }
    for local, parameter in model.named_parameters():
        prefix = next((prefix for prefix in numbers if local.startswith(prefix)), "")
        name = numbers.get(prefix, "") + local[len(prefix) :]
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in patterns))
