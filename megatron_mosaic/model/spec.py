"""What is trained: modules, their geometry, and the edges between them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

from megatron_mosaic.model.layers import Layer
from megatron_mosaic.model.tokens import Distribution
from megatron_mosaic.tokens.names import Preset

LANGUAGE = "language"
"""Name of the module that computes the loss."""

Part = Literal["input", "layers", "output"]
"""Of a module, in the order of the data."""

Precision = Literal["fp32", "fp16", "bf16", "fp8", "mxfp8", "nvfp4"]
"""Of matrix multiplications; weights are kept in 2 bytes with all but fp32, which has 4."""


class LayerRun(NamedTuple):
    """Equal layers, one after the other."""

    count: int
    layer: Layer


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenEmbedding:
    """A table of word vectors.

    Args:
        vocab_size: Rows, before they are padded for tensor parallelism.
        num_positions: Rows of a table of learned positions; 0 is none.
    """

    vocab_size: int
    num_positions: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Patches:
    """A linear map of pieces of an image, video or spectrogram.

    Args:
        values: Numbers of one piece, such as 3 channels * 14 * 14 pixels.
        num_positions: Rows of a table of learned positions; 0 is none.
        extra_tokens: Tokens of each item beside its pieces, such as a class token.
        bias: Whether the map adds a bias.
        normed: Whether a norm follows, as in CLIP.
    """

    values: int
    num_positions: int = 0
    extra_tokens: int = 0
    bias: bool = False
    normed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageHead:
    """Logits and cross entropy.

    Args:
        vocab_size: Logits of each token.
        tied: Whether the weights are those of the word embedding.
        mtp_layers: Depth of multi-token prediction; each level runs a layer like the last one,
            a projection of two tokens to one, and the logits once more.

    Source:
        Multi-token prediction: DeepSeek-V3, arXiv 2412.19437, section 2.2.
    """

    vocab_size: int
    tied: bool = False
    mtp_layers: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Projector:
    """An MLP that brings tokens to the size of the module they go to; a part of its own.

    Args:
        sizes: Size of its input, of what is between its multiplications, and of its output.
        merged_tokens: Tokens that are joined into one before it; ``sizes[0]`` counts all of them.
        pooled: Whether they are joined by a mean, or by one that stands for all such as a class
            token; then ``sizes[0]`` counts one.
        bias: Whether it adds biases.
    """

    sizes: tuple[int, ...]
    merged_tokens: int = 1
    bias: bool = True
    pooled: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleSpec:
    """One module.

    Its parts, in the order of the data: input, layers, output. A pipeline's first stage has the
    input, its last one the output.

    Args:
        name: Key in the model, ``"language"`` for the one that computes the loss.
        hidden_size: Size of a token.
        layers: All layers, in order.
        norm: What layers normalise with; a layer has one for each of its parts.
        causal: Whether a token sees only those before it.
        input: What makes the first tokens; ``None`` where another module's rows are the input.
        output: What becomes of the last ones.
        items_per_sample: Images, clips or utterances of a sample; attention stays inside one.
            The language model has one item: the sequence.
        tokens_per_item: Tokens of one of them, before any merging.
        mask: Who attends to whom in a sequence of the language model; ``None`` is Megatron's
            causal mask, or full attention inside items.
        tokens_per_document: Tokens of a packed document of the language model, rows of other
            modules among them; ``None`` is one document for each sequence.
        trainable: Parts that train, by the names that plans give them (``part_names``), or patterns
            on parameter names such as ``*lora*``; ``None`` is everything, ``()`` is nothing.
        lora_rank: Rank of the adapters that train beside frozen layers; 0 is none.
        final_norm: Whether a norm follows the last layer.
    """

    name: str
    hidden_size: int
    layers: tuple[LayerRun, ...]
    norm: Literal["rms", "layer"] = "rms"
    causal: bool = False
    input: TokenEmbedding | Patches | None = None
    output: LanguageHead | Projector | None = None
    items_per_sample: Distribution
    tokens_per_item: Distribution
    mask: Preset | None = None
    tokens_per_document: Distribution | None = None
    trainable: tuple[str, ...] | None = None
    lora_rank: int = 0
    final_norm: bool = True

    @property
    def part_names(self) -> Mapping[Part, str]:
        """What plans call the module's parts: the input of an encoder is part of the encoder."""
        if self.name == LANGUAGE:
            return {"input": "embedding", "layers": "decoder", "output": "output_layer"}
        return {"input": "encoder", "layers": "encoder", "output": "projector"}

    def trains(self, part: Part) -> bool:
        """Whether all of a part trains."""
        return self.trainable is None or self.part_names[part] in self.trainable

    @property
    def adapters_train(self) -> bool:
        """Whether low-rank adapters train beside frozen layers."""
        patterns = self.trainable or ()
        return self.lora_rank > 0 and any(fnmatchcase("adapter.lora", each) for each in patterns)

    @property
    def num_layers(self) -> int:
        """Layers."""
        return sum(run.count for run in self.layers)

    def each_layer(self) -> Iterator[Layer]:
        """Yields the layers one by one."""
        for count, layer in self.layers:
            for _ in range(count):
                yield layer

    @property
    def tokens_per_sample(self) -> float:
        """Expected tokens of a sample."""
        return self.items_per_sample.mean * self.tokens_per_item.mean

    @property
    def rows_per_sample(self) -> float:
        """Expected rows of a sample that leave the module."""
        merged = self.output.merged_tokens if isinstance(self.output, Projector) else 1
        return self.tokens_per_sample / merged

    @property
    def pairs_per_sample(self) -> float:
        """Expected pairs of tokens of a sample of which one sees the other."""
        pairs = self.tokens_per_item.mean_square
        if self.causal:
            pairs = (pairs + self.tokens_per_item.mean) / 2
        return self.items_per_sample.mean * pairs


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """A model.

    Args:
        name: For people.
        modules: By name; ``"language"`` is one of them.
        edges: Pairs of source and destination module.
        precision: Of matrix multiplications.
        sources: Where the geometry is published.
    """

    name: str
    modules: Mapping[str, ModuleSpec]
    edges: tuple[tuple[str, str], ...] = ()
    precision: Precision = "bf16"
    sources: tuple[str, ...] = ()

    @property
    def language(self) -> ModuleSpec:
        """The language model."""
        return self.modules["language"]

    @property
    def sequence_length(self) -> int:
        """Tokens of a sample in the language model, text and other modalities together."""
        return round(self.language.tokens_per_item.largest)
