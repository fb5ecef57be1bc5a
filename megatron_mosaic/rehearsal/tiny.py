"""Sizes of the thin model that stands in for the one that a plan is for."""

from dataclasses import dataclass
from math import lcm

from megatron_mosaic.layout.placement import LANGUAGE, ModulePlacement
from megatron_mosaic.layout.plan import Plan

VISION = "vision"
HEAD_WIDTH = 4  # the least that rotary embeddings of two pairs need
VOCABULARY = 61
ITEM_ROWS = 4  # of an image of 2 by 2 patches, and of every other item
MOST_ITEMS = 2  # of one sample and one module
MOST_LAYERS = 32  # of one module: deeper ones become as uneven as they were, and thinner


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyModel:
    """Sizes of a rehearsal's model, the least that the plan can split as it does.

    Args:
        num_heads: Attention heads of every module, which tensor parallelism splits.
        num_layers: By module.
        num_experts: Of a layer of the language model; None if it is dense.
        text_length: Tokens of a sample as the script gives them.
        length_multiple: What whole sequences are padded to.
    """

    num_heads: int
    num_layers: dict[str, int]
    num_experts: int | None
    text_length: int
    length_multiple: int

    @property
    def hidden_size(self) -> int:
        """Width of every module."""
        return HEAD_WIDTH * self.num_heads


def is_llava(plan: Plan) -> bool:
    """Whether the plan's modules are those of a LLaVAModel; others are a MimoModel's."""
    return sorted(plan.modules) == [LANGUAGE, VISION] and (LANGUAGE, VISION) not in plan.edges


def tiny_model(plan: Plan) -> TinyModel:
    """Finds the sizes with which a plan is rehearsed."""
    language = plan.language
    tp, cp = language.tensor_model_parallel_size, language.context_parallel_size
    # Sequence parallelism cuts what context parallelism has cut into two chunks for each rank.
    multiple = (2 * cp if cp > 1 else 1) * (tp if language.sequence_parallel else 1)
    shape = language.expert_shape
    items = MOST_ITEMS * len([name for name in plan.encoders if name not in plan.outputs])
    text_length = 16 if is_llava(plan) else ITEM_ROWS * items + 8
    return TinyModel(
        # Two on every rank, so that a wrong order of heads shows.
        num_heads=2 * lcm(*(each.tensor_model_parallel_size for each in plan.modules.values())),
        num_layers={name: _num_layers(each) for name, each in plan.modules.items()},
        num_experts=2 * shape.ep if language.splits_experts else None,
        text_length=-(-text_length // multiple) * multiple,
        length_multiple=1 if language.attention is not None else multiple,
    )


def _num_layers(placement: ModulePlacement) -> int:
    if placement.layers_per_stage is None:
        return placement.num_stages
    return sum(placement.layers_per_stage)


def tiny_arguments(plan: Plan, model: TinyModel, *, stock: bool) -> list[str]:
    """Arguments of Megatron and of the rehearsal's script.

    Args:
        plan: The plan.
        model: Sizes.
        stock: Whether one process runs them without the plan.
    """
    sizes: dict[str, object] = {
        # Of --num-layers Megatron wants that it can be split evenly.
        "encoder-num-layers": model.num_layers.get(VISION, 1),
        "decoder-num-layers": model.num_layers[LANGUAGE],
        "hidden-size": model.hidden_size,
        "num-attention-heads": model.num_heads,
        "ffn-hidden-size": 2 * model.hidden_size,
        "seq-length": model.text_length,
        "max-position-embeddings": 1024,
        "vocab-size": VOCABULARY,
        # Megatron pads to a multiple of this and the tensor-parallel size.
        "make-vocab-size-divisible-by": VOCABULARY
        * (plan.language.tensor_model_parallel_size if stock else 1),
        "micro-batch-size": plan.micro_batch_size,
        "global-batch-size": plan.global_batch_size,
    }
    options = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    if model.num_experts is not None:
        options += [*EXPERTS, "--num-experts", str(model.num_experts)]
    return [*FIXED, *options]


EXPERTS = (
    *("--moe-router-topk", "2", "--moe-aux-loss-coeff", "1e-2"),
    *("--moe-token-dispatcher-type", "alltoall"),
)
FIXED = (
    *("--position-embedding-type", "rope", "--normalization", "RMSNorm"),
    *("--lr", "1e-3", "--lr-decay-style", "constant", "--clip-grad", "1.0"),
    # At the default eps Adam turns the rounding noise of tiny gradients into full steps.
    *("--optimizer", "adam", "--adam-eps", "1e-4", "--weight-decay", "0.01"),
    # Megatron saves the optimizer of several modules in fp32 with sharded states only.
    "--use-distributed-optimizer",
    *("--attention-dropout", "0", "--hidden-dropout", "0"),
    *("--log-interval", "1", "--eval-interval", "1000"),
    *("--tokenizer-type", "NullTokenizer", "--split", "100,0,0", "--num-workers", "0"),
    *("--transformer-impl", "local", "--disable-bias-linear"),
    *("--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion"),
    *("--no-bias-dropout-fusion", "--no-bias-gelu-fusion", "--no-bias-swiglu-fusion"),
    *("--no-rope-fusion", "--no-persist-layer-norm"),
)
