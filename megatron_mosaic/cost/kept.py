"""Tensors that stay from the forward to the backward pass, and what their sizes depend on."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import sqrt
from typing import Literal, NamedTuple

from megatron_mosaic.cost.sizes import ParallelSizes, TrainingSettings
from megatron_mosaic.model.layers import Experts
from megatron_mosaic.model.spec import ModuleSpec, Patches, Precision, TokenEmbedding

Kernels = Literal["flash", "unfused", "local"]
"""Who computes: Transformer Engine with flash attention, Megatron's own fused softmax on a GPU
(which keeps the scores), or Megatron's local layers in plain torch, as on a CPU."""

# Bytes of a number that a matrix multiplication keeps of its input for the weights' gradient.
# Block scales included: one byte per 32 numbers (MXFP8), one per 16 (NVFP4). Source: OCP
# Microscaling Formats v1.0, section 5.2; NVIDIA Transformer Engine, "Using FP8 and FP4".
KEPT_INPUT_BYTES: dict[Precision, float] = {
    "fp32": 4,
    "fp16": 2,
    "bf16": 2,
    "fp8": 1,
    "mxfp8": 1 + 1 / 32,
    "nvfp4": 1 / 2 + 1 / 16,
}

# One of 741 sums beyond, if they are distributed normally: the usual bound of an outlier.
_DEVIATIONS = 3
DEFAULT_SETTINGS = TrainingSettings()


class Kept(NamedTuple):
    """A tensor that stays until the backward pass.

    Args:
        name: What it is.
        bytes: On one rank, for one task.
        weights_only: Whether nothing but the gradient of weights needs it.
    """

    name: str
    bytes: float
    weights_only: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskOnRank:
    """One task of a module on one of its ranks, as far as what it keeps depends on it.

    Args:
        tokens: Tokens that the rank shares with its tensor-parallel peers alone.
        pairs: Query and key positions of one head, whether the mask hides them or not.
        longest: Tokens of the longest item.
        hidden_size: Size of a token.
        norm: What layers normalise with.
        causal: Whether a mask of positions exists.
        rotary: Whether queries and keys are rotated.
        sizes: How the module is split.
        precision: Of matrix multiplications.
        kernels: Who computes.
        dropout: Whether layers and scores drop out.
        swaps_heads: Whether context-parallel ranks swap sequence for heads around attention.
        received: Tokens of other context-parallel ranks whose keys and values stay here.
    """

    tokens: float
    pairs: float
    longest: float
    hidden_size: int
    norm: Literal["rms", "layer"] = "rms"
    causal: bool = True
    rotary: bool = True
    sizes: ParallelSizes
    precision: Precision = "bf16"
    kernels: Kernels = "flash"
    dropout: bool = False
    swaps_heads: bool = False
    received: float = 0.0

    @classmethod
    def of(
        cls,
        module: ModuleSpec,
        *,
        sizes: ParallelSizes,
        samples: float,
        precision: Precision = "bf16",
        kernels: Kernels = "flash",
        settings: TrainingSettings = DEFAULT_SETTINGS,
    ) -> "TaskOnRank":
        """Returns the task of a module on a number of samples.

        Args:
            module: The module.
            sizes: How it is split.
            samples: Samples of the task on one replica.
            precision: Of matrix multiplications.
            kernels: Who computes.
            settings: What all modules have in common.
        """
        source = module.input
        learned = source.num_positions if isinstance(source, TokenEmbedding | Patches) else 0
        tokens, each = _tokens_of_a_full_task(module, samples=samples), module.tokens_per_item
        return cls(
            tokens=tokens / sizes.cp,
            # Long items bring more pairs, in the proportion in which they occur.
            pairs=tokens * (each.mean_square / each.mean if each.mean else 0.0) / sizes.cp,
            longest=each.largest,
            hidden_size=module.hidden_size,
            norm=module.norm,
            causal=module.causal,
            rotary=not learned,
            sizes=sizes,
            precision=precision,
            kernels=kernels,
            dropout=settings.dropout,
            swaps_heads=sizes.cp > 1 and settings.cp_comm == "a2a",
        )

    @property
    def number_bytes(self) -> int:
        """Bytes of a number between operations."""
        return 4 if self.precision == "fp32" else 2

    def input_size_bytes(self, *, tokens: float, width: float) -> float:
        """Bytes that a multiplication keeps of its input; CPUs have no narrow formats."""
        each = self.number_bytes if self.kernels == "local" else KEPT_INPUT_BYTES[self.precision]
        return each * tokens * width

    def sent_tokens(self, experts: Experts) -> float:
        """Tokens on which a rank's experts work if every expert gets as many.

        Ranks that split an expert gather each other's tokens.
        """
        whole = 1 if not self.sizes.sequence_parallel else self.sizes.etp / self.sizes.tp
        return self.tokens * whole * experts.experts_per_token

    @property
    def outer_tokens(self) -> float:
        """Tokens outside the tensor-parallel regions."""
        return self.tokens / (self.sizes.tp if self.sizes.sequence_parallel else 1)


def _tokens_of_a_full_task(module: ModuleSpec, *, samples: float) -> float:
    """Tokens that hardly any task exceeds: memory must hold the worst one, not the mean.

    That is the mean and ``_DEVIATIONS`` standard deviations of the sum over independent samples
    of a number of items, each with its tokens, and no more than the largest values make.
    """
    items, each = module.items_per_sample, module.tokens_per_item
    of_items = items.mean * (each.mean_square - each.mean**2)
    of_numbers = (items.mean_square - items.mean**2) * each.mean**2
    deviation = sqrt(max(samples * (of_items + of_numbers), 0.0))
    likely = samples * items.mean * each.mean + _DEVIATIONS * deviation
    return min(likely, samples * items.largest * each.largest)


def total_bytes(
    kept: Iterable[Kept], *, trains: bool = True, gradient_passes: bool = True
) -> float:
    """Adds up what a part keeps.

    Args:
        kept: Its tensors.
        trains: Whether weights of the part train.
        gradient_passes: Whether something trains upstream of it.
    """
    if not trains and not gradient_passes:
        return 0.0
    return sum(tensor.bytes for tensor in kept if trains or not tensor.weights_only)


def norm_keeps(task: TaskOnRank, *, width: float, tokens: float) -> Iterator[Kept]:
    """Yields what a norm over ``width`` numbers keeps."""
    if task.kernels == "local" and task.norm == "rms":
        # Torch computes it from parts, in fp32: the input, and the quotient for the weight.
        yield Kept("input of a norm", 4 * tokens * width)
        yield Kept("statistics of a norm", 4 * tokens)
        yield Kept("normalised input", 4 * tokens * width, weights_only=True)
        return
    yield Kept("input of a norm", task.number_bytes * tokens * width)
    statistics = 1 if task.norm == "rms" else 2
    size = task.number_bytes if task.kernels == "local" else 4
    yield Kept("statistics of a norm", statistics * size * tokens)


def mask_bytes(task: TaskOnRank) -> int:
    """Bytes of a dropped-out number."""
    # On a CPU torch multiplies with noise; its CUDA kernel keeps a bool.
    return task.number_bytes if task.kernels == "local" else 1


def input_of(name: str, task: TaskOnRank, *, tokens: float, width: float) -> Kept:
    """What a multiplication keeps of its input, for the gradient of its weights."""
    return Kept(
        f"input of {name}", task.input_size_bytes(tokens=tokens, width=width), weights_only=True
    )
