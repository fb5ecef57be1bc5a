"""Geometry of the models of the published points, by the names that the sources give them."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from megatron_mosaic.model.layers import (
    Experts,
    LatentAttention,
    Layer,
    LinearAttention,
    Mlp,
    SelfAttention,
    StateSpace,
)
from megatron_mosaic.model.spec import (
    LanguageHead,
    LayerRun,
    ModelSpec,
    ModuleSpec,
    Patches,
    Projector,
    TokenEmbedding,
)
from megatron_mosaic.model.tokens import Distribution


def language_model(
    name: str,
    *,
    hidden_size: int,
    runs: list[tuple[int, Layer]],
    vocab_size: int,
    norm: str = "rms",
    num_positions: int = 0,
    tied: bool = False,
    mtp_layers: int = 0,
) -> ModelSpec:
    """Describes a language model alone; its sequence length is set by each point."""
    module = ModuleSpec(
        name="language",
        hidden_size=hidden_size,
        layers=tuple(LayerRun(count, layer) for count, layer in runs),
        norm="layer" if norm == "layer" else "rms",
        causal=True,
        input=TokenEmbedding(vocab_size=vocab_size, num_positions=num_positions),
        output=LanguageHead(vocab_size=vocab_size, tied=tied, mtp_layers=mtp_layers),
        items_per_sample=Distribution.constant(1.0),
        tokens_per_item=Distribution.constant(4096.0),
    )
    return ModelSpec(name=name, modules={"language": module})


def with_sequence(model: ModelSpec, length: int) -> ModelSpec:
    """The same model with sequences of another length."""
    language = replace(model.language, tokens_per_item=Distribution.constant(float(length)))
    return replace(model, modules={**model.modules, "language": language})


def with_layers(model: ModelSpec, runs: tuple[LayerRun, ...]) -> ModelSpec:
    """The same model with other layers."""
    return replace(
        model, modules={**model.modules, "language": replace(model.language, layers=runs)}
    )


def _attention(heads: int, groups: int, dim: int, window: int | None = None) -> SelfAttention:
    return SelfAttention(num_heads=heads, num_query_groups=groups, head_dim=dim, window=window)


def llama(name: str, layers: int, hidden: int, heads: int, groups: int, ffn: int, vocab: int):
    """A Llama: Touvron et al., arXiv 2302.13971; sizes of Llama 3 in arXiv 2407.21783, table 3."""
    layer = Layer(
        mixer=_attention(heads, groups, hidden // heads), mlp=Mlp(ffn_hidden_size=ffn, gated=True)
    )
    return language_model(name, hidden_size=hidden, runs=[(layers, layer)], vocab_size=vocab)


def gpt(name: str, layers: int, hidden: int, heads: int):
    """A GPT as arXiv 2205.05198 trains it, table 3: learned positions, biases, GELU."""
    mixer = SelfAttention(
        num_heads=heads, num_query_groups=heads, head_dim=hidden // heads, bias=True
    )
    layer = Layer(mixer=mixer, mlp=Mlp(ffn_hidden_size=4 * hidden, gated=False, bias=True))
    return language_model(
        name,
        hidden_size=hidden,
        runs=[(layers, layer)],
        vocab_size=51200,
        norm="layer",
        num_positions=2048,
        tied=True,
    )


def deepseek(
    name: str,
    *,
    layers: int,
    dense: int,
    hidden: int,
    ffn: int,
    experts: Experts,
    vocab: int,
    heads: int = 128,
    query_rank: int | None = 1536,
    mtp_layers: int = 0,
) -> ModelSpec:
    """A DeepSeek V2 or V3 or a model of that kind: arXiv 2405.04434, 2412.19437."""
    mixer = LatentAttention(
        num_heads=heads,
        query_rank=query_rank,
        key_value_rank=512,
        head_dim=128,
        rotary_head_dim=64,
        value_head_dim=128,
    )
    runs = [
        (dense, Layer(mixer=mixer, mlp=Mlp(ffn_hidden_size=ffn))),
        (layers - dense, Layer(mixer=mixer, mlp=experts)),
    ]
    return language_model(
        name, hidden_size=hidden, runs=runs, vocab_size=vocab, mtp_layers=mtp_layers
    )


def deepseek_v2(layers: int = 60, dense: int = 1) -> ModelSpec:
    """DeepSeek-V2: 236 billion parameters, 21 active."""
    experts = Experts(
        num_experts=160, experts_per_token=6, ffn_hidden_size=1536, shared_ffn_hidden_size=3072
    )
    return deepseek(
        "DeepSeek-V2",
        layers=layers,
        dense=dense,
        hidden=5120,
        ffn=12288,
        experts=experts,
        vocab=102400,
    )


def deepseek_v3(layers: int = 61, dense: int = 3, mtp_layers: int = 1) -> ModelSpec:
    """DeepSeek-V3: 671 billion parameters, 37 active, one layer that predicts a second token."""
    experts = Experts(
        num_experts=256, experts_per_token=8, ffn_hidden_size=2048, shared_ffn_hidden_size=2048
    )
    return deepseek(
        "DeepSeek-V3",
        layers=layers,
        dense=dense,
        hidden=7168,
        ffn=18432,
        experts=experts,
        vocab=129280,
        mtp_layers=mtp_layers,
    )


def kimi_k2() -> ModelSpec:
    """Kimi K2, arXiv 2507.20534: 1 trillion parameters, 32 billion active."""
    experts = Experts(
        num_experts=384, experts_per_token=8, ffn_hidden_size=2048, shared_ffn_hidden_size=2048
    )
    return deepseek(
        "Kimi-K2",
        layers=61,
        dense=1,
        hidden=7168,
        ffn=18432,
        experts=experts,
        vocab=163840,
        heads=64,
    )


def moonlight() -> ModelSpec:
    """Moonlight 16B-A3B, arXiv 2502.16982: DeepSeek-V3's architecture in small."""
    experts = Experts(
        num_experts=64, experts_per_token=6, ffn_hidden_size=1408, shared_ffn_hidden_size=2816
    )
    return deepseek(
        "Moonlight",
        layers=27,
        dense=1,
        hidden=2048,
        ffn=11264,
        experts=experts,
        vocab=163840,
        heads=16,
        query_rank=None,
    )


def qwen3_moe(name: str, layers: int, hidden: int, heads: int, ffn: int) -> ModelSpec:
    """A mixture of experts of Qwen3, arXiv 2505.09388, table 2."""
    experts = Experts(num_experts=128, experts_per_token=8, ffn_hidden_size=ffn)
    layer = Layer(mixer=_attention(heads, 4, 128), mlp=experts)
    return language_model(name, hidden_size=hidden, runs=[(layers, layer)], vocab_size=151936)


def qwen3_dense(name: str, layers: int, hidden: int, heads: int, ffn: int) -> ModelSpec:
    """A dense Qwen3, arXiv 2505.09388, table 1."""
    layer = Layer(mixer=_attention(heads, 8, 128), mlp=Mlp(ffn_hidden_size=ffn))
    return language_model(name, hidden_size=hidden, runs=[(layers, layer)], vocab_size=151936)


def _gated_delta(key_heads: int, value_heads: int) -> LinearAttention:
    return LinearAttention(
        num_key_heads=key_heads, num_value_heads=value_heads, key_head_dim=128, value_head_dim=128
    )


def hybrid_qwen(
    name: str,
    *,
    layers: int,
    hidden: int,
    attention: SelfAttention,
    linear: LinearAttention,
    mlp: Mlp | Experts,
    vocab: int,
) -> ModelSpec:
    """A Qwen3-Next or Qwen3.5: every fourth layer has softmax attention, the others a delta rule."""
    linear_layer, full_layer = Layer(mixer=linear, mlp=mlp), Layer(mixer=attention, mlp=mlp)
    runs = [run for _ in range(layers // 4) for run in ((3, linear_layer), (1, full_layer))]
    return language_model(name, hidden_size=hidden, runs=runs, vocab_size=vocab)


def qwen3_next() -> ModelSpec:
    """Qwen3-Next-80B-A3B, from its published config."""
    attention = SelfAttention(num_heads=16, num_query_groups=2, head_dim=256, output_gate=True)
    experts = Experts(
        num_experts=512, experts_per_token=10, ffn_hidden_size=512, shared_ffn_hidden_size=512
    )
    return hybrid_qwen(
        "Qwen3-Next-80B-A3B",
        layers=48,
        hidden=2048,
        attention=attention,
        linear=_gated_delta(16, 32),
        mlp=experts,
        vocab=151936,
    )


def gpt_oss(name: str, layers: int, experts: int) -> ModelSpec:
    """A GPT-OSS, from its published config: every second layer sees 128 tokens."""
    mlp = Experts(num_experts=experts, experts_per_token=4, ffn_hidden_size=2880)
    near, far = (Layer(mixer=_attention(64, 8, 64, window), mlp=mlp) for window in (128, None))
    runs = [run for _ in range(layers // 2) for run in ((1, near), (1, far))]
    return language_model(name, hidden_size=2880, runs=runs, vocab_size=201088)


def nemotron_hybrid(
    name: str,
    *,
    pattern: str,
    hidden: int,
    attention: SelfAttention,
    mamba: StateSpace,
    mlp: Mlp | Experts,
    mtp_layers: int = 0,
) -> ModelSpec:
    """A Nemotron-H or Nemotron 3 from its pattern: M Mamba-2, * attention, E experts, - MLP."""
    kinds = {
        "M": Layer(mixer=mamba, mlp=None),
        "*": Layer(mixer=attention, mlp=None),
        "E": Layer(mixer=None, mlp=mlp),
        "-": Layer(mixer=None, mlp=mlp),
    }
    return language_model(
        name,
        hidden_size=hidden,
        runs=[(1, kinds[letter]) for letter in pattern],
        vocab_size=131072,
        mtp_layers=mtp_layers,
    )


def nemotron_nano() -> ModelSpec:
    """Nemotron 3 Nano 30B-A3B: the pattern and sizes of Megatron-Bridge's recipe (067f987)."""
    return nemotron_hybrid(
        "Nemotron-3-Nano",
        pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        hidden=2688,
        attention=_attention(32, 2, 128),
        mamba=StateSpace(num_heads=64, head_dim=64, state_size=128, num_groups=8),
        mlp=Experts(
            num_experts=128,
            experts_per_token=6,
            ffn_hidden_size=1856,
            shared_ffn_hidden_size=3712,
            gated=False,
        ),
    )


def nemotron_super() -> ModelSpec:
    """Nemotron 3 Super 120B-A12B, from its published config: latent experts, two tokens ahead."""
    return nemotron_hybrid(
        "Nemotron-3-Super",
        pattern=(
            "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
        ),
        hidden=4096,
        attention=_attention(32, 2, 128),
        mamba=StateSpace(num_heads=128, head_dim=64, state_size=128, num_groups=8),
        mlp=Experts(
            num_experts=512,
            experts_per_token=22,
            ffn_hidden_size=2688,
            shared_ffn_hidden_size=5376,
            gated=False,
            latent_size=1024,
        ),
        mtp_layers=2,
    )


def nemotron_h_56b() -> ModelSpec:
    """Nemotron-H 56B, arXiv 2504.03624, table 1: 54 Mamba-2, 54 MLP and 10 attention layers."""
    pattern = "M-M-M-M*-" + "M-M-M-M-M*-" * 9 + "M-M-M-M-M-"
    return nemotron_hybrid(
        "Nemotron-H-56B",
        pattern=pattern[:118],
        hidden=8192,
        attention=_attention(64, 8, 128),
        mamba=StateSpace(num_heads=256, head_dim=64, state_size=256, num_groups=8),
        mlp=Mlp(ffn_hidden_size=32768, gated=False),
    )


def mixtral(name: str, layers: int, hidden: int, heads: int, ffn: int) -> ModelSpec:
    """A Mixtral, arXiv 2401.04088, table 1."""
    layer = Layer(
        mixer=_attention(heads, 8, 128),
        mlp=Experts(num_experts=8, experts_per_token=2, ffn_hidden_size=ffn),
    )
    return language_model(name, hidden_size=hidden, runs=[(layers, layer)], vocab_size=32000)


def qwen_vision(language: ModelSpec, *, hidden: int, out: int, images: float = 1.0) -> ModelSpec:
    """Adds the vision tower of Qwen3-VL (27 layers of 1152, patches of 2*16*16, 2*2 merged)."""
    mixer = SelfAttention(num_heads=16, num_query_groups=16, head_dim=hidden // 16, bias=True)
    layer = Layer(mixer=mixer, mlp=Mlp(ffn_hidden_size=4304, gated=False, bias=True))
    vision = ModuleSpec(
        name="vision",
        hidden_size=hidden,
        layers=(LayerRun(27, layer),),
        norm="layer",
        input=Patches(values=3 * 2 * 16 * 16, num_positions=2304),
        output=Projector(sizes=(4 * hidden, 4 * hidden, out), merged_tokens=4),
        items_per_sample=Distribution.constant(images),
        tokens_per_item=Distribution.constant(1024.0),
    )
    return replace(
        language,
        modules={"vision": vision, **language.modules},
        edges=(("vision", "language"),),
    )


def qwen35_27b() -> ModelSpec:
    """The 27B dense vision-language model of Qwen3.5 and its successors, from its config."""
    text = hybrid_qwen(
        "Qwen3.5-27B",
        layers=64,
        hidden=5120,
        attention=SelfAttention(num_heads=24, num_query_groups=4, head_dim=256, output_gate=True),
        linear=_gated_delta(16, 48),
        mlp=Mlp(ffn_hidden_size=17408),
        vocab=248320,
    )
    return qwen_vision(text, hidden=1152, out=5120)


def qwen36_35b() -> ModelSpec:
    """The 35B-A3B vision-language model of Qwen3.5 and Qwen3.6, from its config."""
    text = hybrid_qwen(
        "Qwen3.6-35B-A3B",
        layers=40,
        hidden=2048,
        attention=SelfAttention(num_heads=16, num_query_groups=2, head_dim=256, output_gate=True),
        linear=_gated_delta(16, 32),
        mlp=Experts(
            num_experts=256, experts_per_token=8, ffn_hidden_size=512, shared_ffn_hidden_size=512
        ),
        vocab=248320,
    )
    return qwen_vision(text, hidden=1152, out=2048)


def published_models() -> Mapping[str, Callable[[], ModelSpec]]:
    """Makers of models by the beginning of the names that the points file has, in lower case."""
    return {
        "llama3-70b 12 layers": lambda: llama("Llama-3-70B/12", 12, 8192, 64, 8, 28672, 128256),
        # The scripts of SimuMax give this model 16 groups, its paper 8.
        "llama3-405b 4 layers": lambda: llama("Llama-3-405B/4", 4, 16384, 128, 16, 53248, 128256),
        "llama3-8b": lambda: llama("Llama-3-8B", 32, 4096, 32, 8, 14336, 128256),
        "llama3_8b": lambda: llama("Llama-3-8B", 32, 4096, 32, 8, 14336, 128256),
        "llama3_70b": lambda: llama("Llama-3-70B", 80, 8192, 64, 8, 28672, 128256),
        "llama3 70b": lambda: llama("Llama-3-70B", 80, 8192, 64, 8, 28672, 128256),
        "llama3.1_405b": lambda: llama("Llama-3-405B", 126, 16384, 128, 8, 53248, 128256),
        "llama2-7b": lambda: llama("Llama-2-7B", 32, 4096, 32, 32, 11008, 32000),
        "qwen2.5 32b": lambda: llama("Qwen2.5-32B", 64, 5120, 40, 8, 27648, 152064),
        # SimuMax's scripts cut both DeepSeeks to one dense layer and three of experts.
        "deepseekv2 4 layers": lambda: deepseek_v2(layers=4, dense=1),
        "deepseekv3 4 layers": lambda: deepseek_v3(layers=4, dense=1, mtp_layers=0),
        "deepseekv3 (w/o mtp)": lambda: deepseek_v3(mtp_layers=0),
        "deepseekv3": deepseek_v3,
        "deepseek-v3": deepseek_v3,
        "deepseek v3": deepseek_v3,
        "kimi_k2": kimi_k2,
        "kimi k2": kimi_k2,
        "moonlight-16b": moonlight,
        "gpt oss 120b": lambda: gpt_oss("GPT-OSS-120B", 36, 128),
        "gpt-oss-120b": lambda: gpt_oss("GPT-OSS-120B", 36, 128),
        "gpt-oss 120b": lambda: gpt_oss("GPT-OSS-120B", 36, 128),
        "gpt-oss 20b": lambda: gpt_oss("GPT-OSS-20B", 24, 32),
        "gpt oss 20b": lambda: gpt_oss("GPT-OSS-20B", 24, 32),
        "qwen3_30b_a3b": lambda: qwen3_moe("Qwen3-30B-A3B", 48, 2048, 32, 768),
        "qwen3-30b-a3b": lambda: qwen3_moe("Qwen3-30B-A3B", 48, 2048, 32, 768),
        "qwen3 moe 30b": lambda: qwen3_moe("Qwen3-30B-A3B", 48, 2048, 32, 768),
        "qwen3_235b_a22b": lambda: qwen3_moe("Qwen3-235B-A22B", 94, 4096, 64, 1536),
        "qwen3-235b-a22b": lambda: qwen3_moe("Qwen3-235B-A22B", 94, 4096, 64, 1536),
        "qwen3_next_80b": qwen3_next,
        "qwen3-next": qwen3_next,
        "qwen3-8b": lambda: qwen3_dense("Qwen3-8B", 36, 4096, 32, 12288),
        "qwen3_8b": lambda: qwen3_dense("Qwen3-8B", 36, 4096, 32, 12288),
        "qwen3_32b": lambda: qwen3_dense("Qwen3-32B", 64, 5120, 64, 25600),
        "nemotron_3_nano": nemotron_nano,
        "nemotron-3-nano-30b": nemotron_nano,
        "nemotron_3_super": nemotron_super,
        "nemotron-3-super": nemotron_super,
        "nemotron v3 super": nemotron_super,
        "nemotronh_56b": nemotron_h_56b,
        "nemotron-h": nemotron_h_56b,
        "mixtral 8x7b": lambda: mixtral("Mixtral-8x7B", 32, 4096, 32, 14336),
        "mixtral 8x22b": lambda: mixtral("Mixtral-8x22B", 56, 6144, 48, 16384),
        "qwen3.6-vl-35b-a3b": qwen36_35b,
        "qwen3.8-vl-27b": qwen35_27b,
        "qwen3.5-vl-27b": qwen35_27b,
        "gpt 22b": lambda: gpt("GPT-22B", 48, 6144, 64),
        "gpt 175b": lambda: gpt("GPT-175B", 96, 12288, 96),
        "gpt 530b": lambda: gpt("GPT-530B", 105, 20480, 128),
        "gpt 1t": lambda: gpt("GPT-1T", 128, 25600, 160),
        "gpt3_175b": lambda: gpt("GPT-175B", 96, 12288, 96),
    }
