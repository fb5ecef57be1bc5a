"""Small models and clusters to plan for."""

from dataclasses import replace

from megatron_mosaic.cluster.shipped import load_cluster
from megatron_mosaic.cost.cost_model import CostModel
from megatron_mosaic.model.layers import Experts, Layer, Mlp, SelfAttention
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
from megatron_mosaic.planner.problem import Pins, Problem, Space, read_pins

GIB = 2**30


def attention(heads, hidden):
    return SelfAttention(num_heads=heads, num_query_groups=heads, head_dim=hidden // heads)


def encoder(name, *, hidden=1024, layers=6, heads=16, tokens=576, trainable=("projector",)):
    layer = Layer(mixer=attention(heads, hidden), mlp=Mlp(ffn_hidden_size=4 * hidden, gated=False))
    return ModuleSpec(
        name=name,
        hidden_size=hidden,
        layers=(LayerRun(layers, layer),),
        input=Patches(values=588),
        output=Projector(sizes=(hidden, 2048, 2048)),
        items_per_sample=Distribution.constant(1),
        tokens_per_item=Distribution.constant(tokens),
        trainable=trainable,
    )


def language(*, hidden=2048, layers=8, heads=16, tokens=2048, experts=0, trainable=None):
    mlp = Mlp(ffn_hidden_size=4 * hidden)
    if experts:
        mlp = Experts(num_experts=experts, experts_per_token=2, ffn_hidden_size=hidden)
    layer = Layer(mixer=attention(heads, hidden), mlp=mlp)
    return ModuleSpec(
        name="language",
        hidden_size=hidden,
        layers=(LayerRun(layers, layer),),
        causal=True,
        input=TokenEmbedding(vocab_size=32000),
        output=LanguageHead(vocab_size=32000),
        items_per_sample=Distribution.constant(1),
        tokens_per_item=Distribution.constant(tokens),
        trainable=trainable,
    )


def model(*encoders, language=None):
    modules = {module.name: module for module in encoders}
    modules["language"] = language or globals()["language"]()
    return ModelSpec(
        name="small",
        modules=modules,
        edges=tuple((module.name, "language") for module in encoders),
    )


def cluster(num_gpus, *, memory_gib=80.0):
    found = load_cluster("h100", num_gpus=num_gpus)
    return replace(found, gpu=replace(found.gpu, memory_bytes=memory_gib * GIB))


def problem(spec, num_gpus, batch, *, memory_gib=80.0, pins=None, **space):
    # Modules that run at the same time have tests of their own; a second for each plan without.
    space = {"multiplexing": False, **space}
    return Problem(
        model=spec,
        cluster=cluster(num_gpus, memory_gib=memory_gib),
        num_gpus=num_gpus,
        global_batch_size=batch,
        pins=read_pins(pins, model=spec) if pins else Pins(),
        space=Space(**space),
    )


def cost_model(asked):
    return CostModel(asked.model, asked.cluster, asked.settings)
