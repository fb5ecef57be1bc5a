"""What the cost model says of memory against real Megatron models, weighed on CPU."""

from dataclasses import replace
from statistics import mean

import pytest

from megatron_mosaic.cost.ends import loss_keeps
from megatron_mosaic.cost.kept import TaskOnRank, total_bytes
from megatron_mosaic.cost.memory import module_parts, stages_memory
from megatron_mosaic.cost.sizes import ParallelSizes, TrainingSettings
from megatron_mosaic.model.layers import Experts, Layer, Mlp, SelfAttention
from megatron_mosaic.model.spec import (
    LanguageHead,
    LayerRun,
    ModuleSpec,
    Patches,
    Projector,
    TokenEmbedding,
)
from megatron_mosaic.model.tokens import Distribution
from tests.cost.measured import Case, weigh
from tests.ranks import run_ranks

PLAIN = Layer(
    mixer=SelfAttention(num_heads=4, num_query_groups=4, head_dim=16, bias=True),
    mlp=Mlp(ffn_hidden_size=256, gated=False, bias=True),
)
GROUPED = Layer(
    mixer=SelfAttention(num_heads=4, num_query_groups=2, head_dim=16),
    mlp=Mlp(ffn_hidden_size=160),
)
SPARSE = replace(GROUPED, mlp=Experts(num_experts=4, experts_per_token=2, ffn_hidden_size=96))
SHARED = replace(
    GROUPED,
    mlp=Experts(num_experts=4, experts_per_token=2, ffn_hidden_size=96, shared_ffn_hidden_size=112),
)
ONE_GROUP = replace(GROUPED, mixer=replace(GROUPED.mixer, num_query_groups=1))
SHARDED = TrainingSettings(distributed_optimizer=True)
WHOLE = TrainingSettings(distributed_optimizer=False)


def gpt(layer=GROUPED, *, norm="rms", positions=0, tied=False, layers=2, trainable=None):
    return ModuleSpec(
        name="language",
        hidden_size=64,
        layers=(LayerRun(layers, layer),),
        norm=norm,
        causal=True,
        input=TokenEmbedding(vocab_size=256, num_positions=positions),
        output=LanguageHead(vocab_size=256, tied=tied),
        items_per_sample=Distribution.constant(1),
        tokens_per_item=Distribution.constant(32),
        trainable=trainable,
    )


CLIP = ModuleSpec(
    name="vision",
    hidden_size=64,
    layers=(LayerRun(2, PLAIN),),
    norm="layer",
    # 4 * 4 pieces of 3 * 4 * 4 numbers, and a class token.
    input=Patches(values=48, num_positions=17, extra_tokens=1, normed=True),
    items_per_sample=Distribution.constant(1),
    tokens_per_item=Distribution.constant(17),
    final_norm=False,
)
PROJECTED = replace(CLIP, output=Projector(sizes=(64, 192, 128)))

ONE_RANK = {
    "grouped queries, gated, bf16": Case(module=gpt()),
    "plain heads, biases, layer norm, learned positions, fp32": Case(
        module=gpt(PLAIN, norm="layer", positions=32), precision="fp32"
    ),
    "dropout, bf16": Case(
        module=gpt(PLAIN, norm="layer", positions=32), settings=replace(WHOLE, dropout=True)
    ),
    "tied embeddings, fp32, distributed optimizer": Case(
        module=gpt(tied=True), precision="fp32", settings=SHARDED
    ),
    "normed queries and keys": Case(
        module=gpt(replace(GROUPED, mixer=replace(GROUPED.mixer, qk_norm=True, qkv_bias=True)))
    ),
    "selective recompute": Case(module=gpt(), sizes=ParallelSizes(recompute="selective")),
    "full recompute": Case(module=gpt(), sizes=ParallelSizes(recompute="full")),
    "experts": Case(module=gpt(SPARSE)),
    "experts and a shared one": Case(module=gpt(SHARED)),
    "frozen layers behind a trainable embedding": Case(
        module=gpt(trainable=("embedding", "output_layer"))
    ),
    "frozen layers with nothing trainable before them": Case(
        module=gpt(PLAIN, norm="layer", positions=32, trainable=("output_layer",))
    ),
    "image encoder, fp32": Case(module=CLIP, precision="fp32"),
    "image encoder and projector": Case(module=PROJECTED),
    "frozen image encoder and projector": Case(module=replace(PROJECTED, trainable=("projector",))),
    "gradients in 2 bytes": Case(module=gpt(), settings=replace(WHOLE, gradient_bytes=2)),
}
TWO_RANKS = {
    "tensor and sequence parallel": Case(
        module=gpt(), sizes=ParallelSizes(tp=2, sequence_parallel=True)
    ),
    "tensor parallel, biases": Case(
        module=gpt(PLAIN, norm="layer", positions=32), sizes=ParallelSizes(tp=2)
    ),
    "one group of queries on two ranks": Case(module=gpt(ONE_GROUP), sizes=ParallelSizes(tp=2)),
    "pipeline, tied embeddings": Case(module=gpt(tied=True), sizes=ParallelSizes(pp=2)),
    "distributed optimizer": Case(module=gpt(), sizes=ParallelSizes(dp=2), settings=SHARDED),
    "experts on two ranks": Case(
        module=gpt(SPARSE), sizes=ParallelSizes(dp=2, ep=2), settings=SHARDED
    ),
}
FOUR_RANKS = {
    "tensor and pipeline parallel": Case(
        module=gpt(PLAIN, norm="layer", positions=32),
        sizes=ParallelSizes(tp=2, pp=2, sequence_parallel=True),
    ),
}
CASES = ONE_RANK | TWO_RANKS | FOUR_RANKS


@pytest.fixture(scope="module")
def weighed():
    result = {}
    for number, cases in ((1, ONE_RANK), (2, TWO_RANKS), (4, FOUR_RANKS)):
        ranks = run_ranks(weigh, number, list(cases.values()))
        result |= dict(zip(cases, zip(*ranks, strict=True), strict=True))
    return result


def estimate(case):
    """The stages' memory, and what the loss keeps besides, which the last stage soon frees."""
    common = {"sizes": case.sizes, "settings": case.settings, "precision": case.precision}
    parts = module_parts(case.module, samples=case.samples, kernels="local", **common)
    task = TaskOnRank.of(
        case.module,
        sizes=case.sizes,
        settings=case.settings,
        samples=case.samples,
        precision=case.precision,
        kernels="local",
    )
    loss = total_bytes(loss_keeps(case.module, task, fused=False))
    return stages_memory(parts, **common), loss


@pytest.mark.parametrize("name", CASES)
def test_weights_and_gradients_are_those_of_megatron(name, weighed):
    stages, _ = estimate(CASES[name])

    for rank in weighed[name]:
        assert stages[rank.stage].weights == rank.weights
        assert stages[rank.stage].gradients == rank.gradients


@pytest.mark.parametrize("name", CASES)
def test_optimizer_state_is_that_of_megatron(name, weighed):
    stages, _ = estimate(CASES[name])

    # A distributed optimizer cuts one long buffer, padded, into equal parts: only the sum over
    # the replicas is exact.
    expected = sum(stages[rank.stage].optimizer for rank in weighed[name])
    assert sum(rank.optimizer for rank in weighed[name]) == expected


@pytest.mark.parametrize("name", CASES)
def test_saved_activations_are_those_of_megatron(name, weighed):
    stages, loss = estimate(CASES[name])

    for index, stage in enumerate(stages):
        # Tokens choose their experts, so one rank has more to keep than another; the mean is
        # what the estimate means. All other ranks of a stage are equal.
        saved = mean(rank.saved for rank in weighed[name] if rank.stage == index)
        last = index == len(stages) - 1
        assert stage.activations_per_task + (loss if last else 0.0) == pytest.approx(
            saved, rel=0.01
        )
