"""Builds tiny Megatron models from the cost model's own descriptions, and weighs them.

A model runs one microbatch on every rank: its forward pass, backward pass and optimizer step.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.spec_utils import get_submodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mosaic.cost.sizes import ParallelSizes, TrainingSettings
from megatron_mosaic.model.layers import Experts, Layer, Mlp, SelfAttention
from megatron_mosaic.model.spec import (
    LanguageHead,
    ModuleSpec,
    Patches,
    Precision,
    Projector,
    TokenEmbedding,
)

WHOLE = TrainingSettings(distributed_optimizer=False)
RECOMPUTE = {
    None: {},
    "selective": {"recompute_granularity": "selective"},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A module, how it is split, and how it trains."""

    module: ModuleSpec
    sizes: ParallelSizes = field(default_factory=ParallelSizes)
    settings: TrainingSettings = WHOLE
    precision: Precision = "bf16"
    samples: int = 2


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """What one rank held, in bytes; ``saved`` also has what the module hands on."""

    stage: int
    weights: int
    gradients: int
    optimizer: int
    saved: int


def weigh(rank: int, cases: list[Case]) -> list[Weighed]:
    """Weighs one case after the other on this rank."""
    results = []
    for case in cases:
        sizes = case.sizes
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=sizes.tp,
            pipeline_model_parallel_size=sizes.pp,
            expert_model_parallel_size=sizes.ep,
            expert_tensor_parallel_size=sizes.etp,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        results.append(_weigh(case))
        parallel_state.destroy_model_parallel()
    return results


def _weigh(case: Case) -> Weighed:
    config = _config(case)
    model = _model(case, config)
    _freeze(model, case.module)
    if case.precision == "bf16":
        model = model.bfloat16()
    options = DistributedDataParallelConfig(
        use_distributed_optimizer=case.settings.distributed_optimizer,
        grad_reduce_in_fp32=case.settings.gradient_bytes == 4,
    )
    parallel_model = DistributedDataParallel(config, options, model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            lr=1e-3,
            bf16=case.precision == "bf16",
            params_dtype=config.params_dtype,
            use_distributed_optimizer=case.settings.distributed_optimizer,
        ),
        [parallel_model],
    )
    output, saved = _saved_bytes(lambda: _forward(model, case, config), model)
    if output.requires_grad:
        output.sum().backward()
    parallel_model.finish_grad_sync()
    optimizer.step()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return Weighed(
        stage=parallel_state.get_pipeline_model_parallel_rank(),
        weights=sum(map(_bytes, model.parameters())),
        gradients=sum(_bytes(weight.main_grad) for weight in trained),
        optimizer=_optimizer_bytes(optimizer, model),
        saved=saved + (0 if isinstance(case.module.output, LanguageHead) else _bytes(output)),
    )


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _config(case: Case) -> TransformerConfig:
    module, sizes = case.module, case.sizes
    layer = next(module.each_layer())
    assert isinstance(layer.mixer, SelfAttention)
    mlp = layer.mlp
    assert isinstance(mlp, Mlp | Experts)
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    dropout = 0.1 if case.settings.dropout else 0.0
    return TransformerConfig(
        num_layers=module.num_layers,
        hidden_size=module.hidden_size,
        num_attention_heads=layer.mixer.num_heads,
        num_query_groups=layer.mixer.num_query_groups,
        kv_channels=layer.mixer.head_dim,
        ffn_hidden_size=mlp.ffn_hidden_size,
        gated_linear_unit=mlp.gated,
        activation_func=torch.nn.functional.silu if mlp.gated else torch.nn.functional.gelu,
        add_bias_linear=layer.mixer.bias,
        add_qkv_bias=layer.mixer.qkv_bias,
        qk_layernorm=layer.mixer.qk_norm,
        normalization="RMSNorm" if module.norm == "rms" else "LayerNorm",
        hidden_dropout=dropout,
        attention_dropout=dropout,
        bf16=case.precision == "bf16",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=sizes.tp,
        pipeline_model_parallel_size=sizes.pp,
        expert_model_parallel_size=sizes.ep,
        expert_tensor_parallel_size=sizes.etp,
        sequence_parallel=sizes.sequence_parallel,
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        **_expert_options(mlp),
        **RECOMPUTE[sizes.recompute],
    )


def _expert_options(mlp: Mlp | Experts) -> dict[str, object]:
    if isinstance(mlp, Mlp):
        return {}
    return {
        "num_moe_experts": mlp.num_experts,
        "moe_router_topk": mlp.experts_per_token,
        "moe_ffn_hidden_size": mlp.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": mlp.shared_ffn_hidden_size or None,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "none",
    }


def _model(case: Case, config: TransformerConfig) -> torch.nn.Module:
    module = case.module
    if isinstance(module.input, Patches):
        side, piece = _image(module)
        vision = CLIPViTModel(
            config, get_vit_layer_with_local_spec(), img_h=side, img_w=side, patch_dim=piece
        )
        if module.output is None:
            return vision
        assert isinstance(module.output, Projector)
        return ProjectedImages(vision, module.output)
    assert isinstance(module.input, TokenEmbedding)
    assert isinstance(module.output, LanguageHead)
    layer: Layer = next(module.each_layer())
    experts = layer.mlp.num_experts if isinstance(layer.mlp, Experts) else None
    assert isinstance(layer.mixer, SelfAttention)
    spec = get_gpt_layer_local_spec(
        num_experts=experts,
        normalization=config.normalization,
        moe_grouped_gemm=False,
        qk_layernorm=layer.mixer.qk_norm,
    )
    learned = module.input.num_positions
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=module.input.vocab_size,
        max_sequence_length=learned or _length(module),
        position_embedding_type="learned_absolute" if learned else "rope",
        share_embeddings_and_output_weights=module.output.tied,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )


class ProjectedImages(torch.nn.Module):
    """An image encoder and its projector, as ``LLaVAModel`` joins them."""

    def __init__(self, vision: CLIPViTModel, projector: Projector) -> None:
        super().__init__()
        before, between, after = projector.sizes
        config = replace(vision.config, hidden_size=after, ffn_hidden_size=between)
        spec = get_gpt_layer_local_spec().submodules.mlp
        self.vision_model = vision
        self.vision_projection = MultimodalProjector(config, get_submodules(spec), "mlp", before)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.vision_projection(self.vision_model(images))


def _length(module: ModuleSpec) -> int:
    return round(module.tokens_per_item.largest)


def _image(module: ModuleSpec) -> tuple[int, int]:
    """Side of a square image of three channels, and of its pieces."""
    assert isinstance(module.input, Patches)
    piece = round((module.input.values / 3) ** 0.5)
    return piece * round((_length(module) - module.input.extra_tokens) ** 0.5), piece


PREFIXES = {
    "embedding": ("embedding",),
    "decoder": ("decoder.layers",),
    "output_layer": ("output_layer",),
    "projector": ("vision_projection",),
}


def _freeze(model: torch.nn.Module, module: ModuleSpec) -> None:
    """Freezes what the description does not name; the last norm belongs to the head."""
    if module.trainable is None:
        return
    kept = tuple(start for part in module.trainable for start in PREFIXES[part])
    if "output_layer" in module.trainable:
        kept += ("decoder.final_layernorm",)
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.startswith(kept))


def _forward(model: torch.nn.Module, case: Case, config: TransformerConfig) -> torch.Tensor:
    module, generator = case.module, torch.Generator().manual_seed(0)
    if isinstance(module.input, Patches):
        side, _ = _image(module)
        return model(torch.randn(case.samples, 3, side, side, dtype=config.params_dtype))
    length = _length(module)
    assert isinstance(module.input, TokenEmbedding)
    shape = (case.samples, length)
    tokens = torch.randint(module.input.vocab_size, shape, generator=generator)
    if not model.pre_process:
        split = case.sizes.tp if case.sizes.sequence_parallel else 1
        rows = torch.randn(
            length // split, case.samples, module.hidden_size, dtype=config.params_dtype
        )
        model.set_input_tensor(rows.requires_grad_())
    positions = torch.arange(length).expand(case.samples, -1)
    return model(tokens, positions, None, labels=tokens if model.post_process else None)


def _saved_bytes(
    forward: Callable[[], torch.Tensor], model: torch.nn.Module
) -> tuple[torch.Tensor, int]:
    """Runs a forward pass and counts the storages that it keeps, each once, without weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    return output, sum(storage.nbytes() for storage in kept.values())


def _optimizer_bytes(optimizer: object, model: torch.nn.Module) -> int:
    """Adds up an optimizer's state and its own copies of weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    total = 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        if inner is None:  # nothing for it to train
            continue
        for state in inner.state.values():
            moments = [value for value in state.values() if isinstance(value, torch.Tensor)]
            total += sum(_bytes(value) for value in moments if value.dim())
        for group in inner.param_groups:
            total += sum(
                _bytes(weight)
                for weight in group["params"]
                if weight.untyped_storage().data_ptr() not in weights
            )
    return total
