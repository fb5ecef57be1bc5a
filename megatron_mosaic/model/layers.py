"""The geometry of one transformer layer: what its parts multiply, in sizes alone."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfAttention:
    """Softmax attention with any number of query groups.

    Args:
        num_heads: Query heads.
        num_query_groups: Key and value heads; ``num_heads`` is plain multi-head attention.
        head_dim: Size of each head.
        window: Keys that a query sees at most; ``None`` is all that the mask lets it see.
        output_gate: Whether the input projection also makes a gate for the output (Qwen3-Next).
        bias: Whether the projections add a bias.
        qkv_bias: Whether the input projection adds one where the output projection does not.
        qk_norm: Whether queries and keys are normalised, head by head.
    """

    num_heads: int
    num_query_groups: int
    head_dim: int
    window: int | None = None
    output_gate: bool = False
    bias: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentAttention:
    """Multi-head latent attention.

    Args:
        num_heads: Heads.
        query_rank: Size of the queries' latent; ``None`` projects them directly.
        key_value_rank: Size of the keys' and values' latent.
        head_dim: Size of a head without its rotary part.
        rotary_head_dim: Size of the rotary part; the keys share one.
        value_head_dim: Size of a value head.

    Source:
        DeepSeek-V2, arXiv 2405.04434, section 2.1.
    """

    num_heads: int
    query_rank: int | None
    key_value_rank: int
    head_dim: int
    rotary_head_dim: int
    value_head_dim: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearAttention:
    """Gated delta rule: attention whose cost grows with the sequence, not with its square.

    Args:
        num_key_heads: Heads of queries and keys.
        num_value_heads: Heads of values.
        key_head_dim: Size of a key head.
        value_head_dim: Size of a value head.
        convolution_width: Tokens that the short convolution sees.

    Source:
        Gated DeltaNet, arXiv 2412.06464, as Qwen3-Next and Qwen3.5 use it.
    """

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    convolution_width: int = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class StateSpace:
    """A Mamba-2 mixer.

    Args:
        num_heads: Heads.
        head_dim: Size of a head.
        state_size: Size of the state of each channel.
        num_groups: Groups that share their input and output maps.
        convolution_width: Tokens that the short convolution sees.

    Source:
        Mamba-2, arXiv 2405.21060.
    """

    num_heads: int
    head_dim: int
    state_size: int
    num_groups: int
    convolution_width: int = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Mlp:
    """A dense feed-forward part.

    Args:
        ffn_hidden_size: Size between its two multiplications.
        gated: Whether a second input projection gates the first (SwiGLU, GeGLU).
        bias: Whether the projections add a bias.
    """

    ffn_hidden_size: int
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """A mixture of experts.

    Args:
        num_experts: Routed experts.
        experts_per_token: Experts that each token goes to.
        ffn_hidden_size: Size inside each expert.
        shared_ffn_hidden_size: Size inside the expert that all tokens go to; 0 is none.
        gated: Whether experts are gated.
        latent_size: Size to which tokens are projected before they are sent; ``None`` is none.
        bias: Whether the projections of the experts add a bias.
        shared_gate: Whether a gate scales the output of the shared expert.
    """

    num_experts: int
    experts_per_token: int
    ffn_hidden_size: int
    shared_ffn_hidden_size: int = 0
    gated: bool = True
    latent_size: int | None = None
    bias: bool = False
    shared_gate: bool = False


Mixer = SelfAttention | LatentAttention | LinearAttention | StateSpace


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One layer: what mixes tokens, and what works on each alone; either may be missing."""

    mixer: Mixer | None
    mlp: Mlp | Experts | None
