from dataclasses import replace

import pytest

from megatron_mosaic.cost.activations import layer_keeps
from megatron_mosaic.cost.costs import PartCosts, PartRun
from megatron_mosaic.cost.ends import loss_keeps, loss_working_bytes, output_keeps
from megatron_mosaic.cost.kept import TaskOnRank, total_bytes
from megatron_mosaic.cost.memory import (
    live_tasks,
    module_parts,
    split_layers,
    stage_memory,
    stages_memory,
)
from megatron_mosaic.cost.sizes import ParallelSizes, TrainingSettings
from megatron_mosaic.cost.working import layer_working_bytes, weight_shapes
from megatron_mosaic.model.layers import Experts, LatentAttention, Layer, Mlp, SelfAttention
from megatron_mosaic.model.spec import (
    LanguageHead,
    LayerRun,
    ModuleSpec,
    Patches,
    Projector,
    TokenEmbedding,
)
from megatron_mosaic.model.tokens import Distribution

GIB = 2**30
LLAMA = Layer(
    mixer=SelfAttention(num_heads=32, num_query_groups=8, head_dim=128),
    mlp=Mlp(ffn_hidden_size=14336),
)
GPT_22B = Layer(
    mixer=SelfAttention(num_heads=64, num_query_groups=64, head_dim=96, bias=True),
    mlp=Mlp(ffn_hidden_size=4 * 6144, gated=False, bias=True),
)
ONE = ParallelSizes()
PLAIN = TrainingSettings(distributed_optimizer=False)
PAPER = replace(PLAIN, flash_attention=False, dropout=True, cross_entropy_fusion=False)


def module(layer=LLAMA, *, hidden_size=4096, layers=32, length=4096, vocab=128256, **options):
    return ModuleSpec(
        **{
            "name": "language",
            "hidden_size": hidden_size,
            "layers": (LayerRun(layers, layer),),
            "causal": True,
            "input": TokenEmbedding(vocab_size=vocab),
            "output": LanguageHead(vocab_size=vocab),
            "items_per_sample": Distribution.constant(1),
            "tokens_per_item": Distribution.constant(length),
        }
        | options
    )


def task(spec, *, sizes=ONE, samples=1, settings=PLAIN, **options):
    return TaskOnRank.of(spec, sizes=sizes, samples=samples, settings=settings, **options)


def activations(layer, spec, *, sizes=ONE, trains=True, gradient_passes=True, **options):
    kept = layer_keeps(layer, task(spec, sizes=sizes, **options), recompute=sizes.recompute)
    return total_bytes(kept, trains=trains, gradient_passes=gradient_passes)


def memory(spec, *, sizes=ONE, settings=PLAIN, samples=1, precision="bf16", layers=None):
    common = {"sizes": sizes, "settings": settings, "precision": precision}
    parts = module_parts(spec, samples=samples, **common)
    return stages_memory(parts, layers_per_stage=layers, **common)


def test_layer_of_llama_keeps_what_its_operators_save():
    # Per token: two norms 2*(2*4096 + 4), their outputs 2*2*4096, queries, keys and values
    # 2*(4096 + 2*1024), output of attention 2*4096, sums of exponentials 4*32, input of the
    # activation function 2*2*14336, input of the second map 2*14336: 139,400 bytes.
    assert activations(LLAMA, module()) == 4096 * 139_400


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        # s*b*h * (34 + 5*a*s/h), s*b*h = 50,331,648, 5*a*s/h = 106.667
        (ParallelSizes(), 50_331_648 * (34 + 106.6667)),
        # tensor parallel: 10 + 24/t + 5*a*s/(h*t)
        (ParallelSizes(tp=8), 50_331_648 * (10 + 3 + 13.33333)),
        # and sequence parallel: 34/t + 5*a*s/(h*t)
        (ParallelSizes(tp=8, sequence_parallel=True), 50_331_648 * (4.25 + 13.33333)),
        # with selective recompute: 34/t
        (ParallelSizes(tp=8, sequence_parallel=True, recompute="selective"), 50_331_648 * 4.25),
        # recomputed: 2
        (ParallelSizes(recompute="full"), 50_331_648 * 2),
    ],
)
def test_layer_keeps_what_korthikanti_et_al_count(sizes, expected):
    # arXiv 2205.05198, table 2; they leave the statistics of norms out, 0.04 % at most.
    gpt = module(GPT_22B, hidden_size=6144, length=2048, norm="layer")
    kept = activations(GPT_22B, gpt, sizes=sizes, samples=4, settings=PAPER, kernels="unfused")

    assert kept == pytest.approx(expected, rel=1e-3)


def test_layer_that_is_frozen_keeps_less_and_nothing_if_nobody_trains_before_it():
    spec = module()

    # Without the inputs of its maps: 2*4096 twice, 2*14336. Attention's output stays, for its
    # own gradient.
    assert activations(LLAMA, spec, trains=False) == 4096 * (139_400 - 4 * 4096 - 2 * 14336)
    assert activations(LLAMA, spec, trains=False, gradient_passes=False) == 0


def test_layer_of_experts_keeps_a_copy_of_a_token_for_each_of_its_experts():
    def kept(chosen):
        mlp = Experts(num_experts=64, experts_per_token=chosen, ffn_hidden_size=1024)
        layer = Layer(mixer=None, mlp=mlp)
        return activations(layer, module(layer))

    # Input 2*4096, weight 2, between the maps 2*2*1024 and 2*1024.
    assert kept(3) - kept(2) == 4096 * (8192 + 2 + 4096 + 2048)


def test_layer_of_experts_keeps_as_much_however_many_ranks_share_them():
    mlp = Experts(num_experts=64, experts_per_token=4, ffn_hidden_size=1024)
    layer = Layer(mixer=None, mlp=mlp)
    spec = module(layer)

    whole = activations(layer, spec, sizes=ParallelSizes(dp=8))
    assert activations(layer, spec, sizes=ParallelSizes(dp=8, ep=8)) == whole


def test_layer_of_latent_attention_keeps_its_latents_and_all_heads():
    mixer = LatentAttention(
        num_heads=128,
        query_rank=1536,
        key_value_rank=512,
        head_dim=128,
        rotary_head_dim=64,
        value_head_dim=128,
    )
    layer = Layer(mixer=mixer, mlp=None)

    # Per token: norms of 7168, 1536 and 512 numbers and the inputs behind them 2*2*9216 + 3*4;
    # queries and keys of 192, values and output of 128 for 128 heads; sums of exponentials 4*128.
    expected = 4 * 9216 + 12 + 2 * 128 * (2 * 192 + 2 * 128) + 512
    assert activations(layer, module(layer, hidden_size=7168)) == 4096 * expected


def test_layer_in_fp8_keeps_one_byte_of_each_input_of_a_map():
    narrow = activations(LLAMA, module(), precision="fp8")

    # Two inputs of 4096 and one of 14336 shrink by a byte. Attention's output, 4096, has a copy.
    assert narrow == 4096 * (139_400 - 2 * 4096 - 14336 + 4096)


def test_layer_keeps_no_more_with_more_context_parallel_ranks():
    sizes = [ParallelSizes(cp=cp) for cp in (1, 2, 4, 8)]

    kept = [activations(LLAMA, module(length=32768), sizes=each) for each in sizes]
    assert kept == sorted(kept, reverse=True)
    assert kept[3] == kept[0] / 8


def test_working_bytes_hold_the_gradient_of_the_gated_map_beside_that_of_the_output():
    # 2 bytes * 4096 tokens * (4096 + 2*14336).
    assert layer_working_bytes(LLAMA, task(module())) == 2 * 4096 * 32768


def test_working_bytes_of_full_recompute_hold_all_of_one_layer():
    full = layer_working_bytes(LLAMA, task(module(), sizes=ParallelSizes(recompute="full")))

    assert full == 2 * 4096 * 32768 + 4096 * 139_400


def test_loss_keeps_a_softmax_in_fp32_unless_one_kernel_computes_it():
    spec = module()

    # 4096 tokens * 128,256 logits, in 4 bytes with index and mask of the target, or in 2.
    assert total_bytes(loss_keeps(spec, task(spec), fused=False)) == 4096 * (4 * 128_256 + 9)
    assert total_bytes(loss_keeps(spec, task(spec), fused=True)) == 4096 * 2 * 128_256


def test_loss_works_on_logits_a_gradient_and_a_placeholder_of_the_weights():
    spec = module()

    # 2 * (4096*128256 logits + 4096*4096 gradient of the hidden states + 128256*4096 weights).
    working = loss_working_bytes(spec, task(spec), fused=True)
    assert working == 2 * (2 * 4096 * 128_256 + 4096 * 4096)


def test_output_of_a_projector_keeps_inputs_of_both_maps_and_of_the_function_between():
    spec = module(
        input=Patches(values=588), output=Projector(sizes=(4 * 4096, 2048, 1024), merged_tokens=4)
    )
    spec = replace(spec, final_norm=False)

    # 4096 tokens make 1024 rows: 2*(16384 + 2048 + 2048) bytes of each.
    assert total_bytes(output_keeps(spec, task(spec))) == 1024 * 2 * 20_480


def test_task_has_room_for_more_images_than_the_mean():
    def tokens(samples):
        images = Distribution.of_weights([0, 2], [1, 1])
        spec = module(items_per_sample=images, tokens_per_item=Distribution.constant(576))
        return task(spec, samples=samples).tokens

    # 100 samples have 100 images on average, with a standard deviation of sqrt(100)*1 = 10.
    assert tokens(100) == pytest.approx(576 * 130)
    # One sample never has more than two.
    assert tokens(1) == 576 * 2


def test_task_of_equal_items_has_their_number_of_tokens():
    assert task(module(), samples=3).tokens == 3 * 4096


def test_output_of_a_frozen_encoder_waits_for_its_reader():
    spec = module(
        layers=2,
        input=Patches(values=588),
        output=Projector(sizes=(4 * 4096, 2048, 1024), merged_tokens=4),
        trainable=(),
    )

    # 1024 rows of 1024 numbers, and nothing for a backward pass.
    assert memory(spec)[0].activations_per_task == 1024 * 2 * 1024


def test_stage_holds_18_bytes_of_each_weight_without_a_distributed_optimizer():
    stage = stage_memory(
        [PartRun(2, PartCosts(parameters=100.0))], sizes=ParallelSizes(dp=4), settings=PLAIN
    )

    assert (stage.weights, stage.gradients, stage.optimizer) == (400, 800, 2400)


def test_stage_shares_the_optimizer_among_replicas_of_all_weights_or_of_experts():
    part = PartCosts(parameters=100.0, expert_parameters=100.0)
    stage = stage_memory(
        [PartRun(1, part)],
        sizes=ParallelSizes(dp=4, cp=2, ep=4),
        settings=TrainingSettings(distributed_optimizer=True),
    )

    # 12*100/8 for eight replicas, 12*100/2 for two of each expert.
    assert stage.optimizer == 150 + 600


def test_stage_in_fp32_has_no_master_weights():
    stage = stage_memory(
        [PartRun(1, PartCosts(parameters=100.0))],
        sizes=ONE,
        settings=replace(PLAIN, gradient_bytes=2),
        precision="fp32",
    )

    assert (stage.weights, stage.gradients, stage.optimizer) == (400, 400, 800)


def test_stage_that_is_frozen_has_weights_alone():
    stage = stage_memory(
        [PartRun(1, PartCosts(parameters=100.0, trainable=0.0))], sizes=ONE, settings=PLAIN
    )

    assert (stage.weights, stage.gradients, stage.optimizer) == (200, 0, 0)


def test_stage_with_sharded_weights_gathers_two_layers():
    stage = stage_memory(
        [PartRun(10, PartCosts(parameters=100.0))],
        sizes=ParallelSizes(dp=4),
        settings=TrainingSettings(fsdp=True),
    )

    # A quarter of 1000 weights, in 2, 4 and 12 bytes; two whole layers in 2.
    assert (stage.weights, stage.gradients, stage.optimizer) == (500, 1000, 3000)
    assert stage.working == 400


def test_stage_has_one_placeholder_for_all_weights_of_a_shape():
    shapes = weight_shapes(LLAMA, task(module()))
    part = PartRun(32, PartCosts(weight_shapes=shapes))

    # (6144 + 4096 + 28672 + 14336) * 4096 numbers of 2 bytes.
    assert shapes == {(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)}
    assert stage_memory([part, part], sizes=ONE, settings=PLAIN).buffers == 53_248 * 4096 * 2


def test_stage_meets_the_gradient_of_the_table_when_activations_are_gone():
    # The table's gradient in 2 bytes: 2 * 128256*4096 = 1.05 GB, a layer keeps 0.57 GB.
    small = memory(module(layers=1, output=None))[0]
    large = memory(module(layers=4, output=None))[0]

    kept = small.activations_per_task
    assert small.total(live_tasks=1) - kept - small.working == pytest.approx(
        small.weights + small.gradients + small.optimizer + small.buffers
    )
    assert small.working == 2 * 128_256 * 4096 - kept
    assert large.working == 2 * 4096 * 32768


def test_stage_copies_gradients_of_2_bytes_for_the_optimizer():
    stage = stage_memory(
        [PartRun(1, PartCosts(parameters=100.0, activation_bytes=50.0))],
        sizes=ParallelSizes(dp=2),
        settings=TrainingSettings(gradient_bytes=2),
    )

    # 4 bytes of 50 weights, when the 50 bytes of activations are gone.
    assert stage.gradients == 200
    assert stage.working == 150


def test_memory_of_adapters_counts_them_alone_as_trained():
    whole = module(trainable=("*lora*",), lora_rank=16)
    stage = memory(whole)[0]

    # Rank 16 beside four maps: 16*(10240 + 8192 + 32768 + 18432) in each of 32 layers.
    assert stage.gradients == pytest.approx(4 * 32 * 16 * 69_632)


def test_memory_of_a_tied_head_repeats_the_table_on_the_last_stage():
    spec = module(layers=2, output=LanguageHead(vocab_size=128256, tied=True))

    one, two = memory(spec)[0], memory(spec, sizes=ParallelSizes(pp=2))
    assert two[0].weights + two[1].weights - one.weights == 2 * 128_256 * 4096


def test_memory_with_further_predictions_has_a_layer_more_and_its_logits():
    plain = memory(module(layers=2))[0]
    more = memory(module(layers=2, output=LanguageHead(vocab_size=128256, mtp_layers=1)))[0]

    # A layer of 218,112,000 weights, three norms and a map of 2*4096*4096.
    assert more.weights - plain.weights == 2 * (218_112_000 + 3 * 4096 + 2 * 4096**2)
    assert more.working - plain.working == 2 * 4096 * 128_256


def test_split_layers_cuts_runs_where_stages_end():
    first, second = PartCosts(parameters=1.0), PartCosts(parameters=2.0)

    stages = split_layers([PartRun(3, first), PartRun(2, second)], [2, 3])
    assert stages == [[PartRun(2, first)], [PartRun(1, first), PartRun(2, second)]]


@pytest.mark.parametrize(
    ("stage", "microbatches", "chunks", "expected"),
    [
        (0, 8, 1, 4),  # as many as there are stages
        (3, 8, 1, 1),
        (0, 2, 1, 2),  # no more than there are
        # Two chunks: 2*3 + 4 warm-up tasks and one, each half a stage.
        (0, 8, 2, 5.5),
        (3, 8, 2, 2.5),
    ],
)
def test_live_tasks_of_four_stages(stage, microbatches, chunks, expected):
    number = live_tasks(stage, num_stages=4, num_microbatches=microbatches, chunks=chunks)

    assert number == expected


def test_live_tasks_of_interleaved_stages_are_those_of_korthikanti_et_al():
    # arXiv 2205.05198, equation 5: L/p layers * p * (1 + (p-1)/(p*m)), for p = 35 and m = 3.
    live = live_tasks(0, num_stages=35, num_microbatches=280, chunks=3)

    assert live == pytest.approx(35 * (1 + 34 / 105))


@pytest.mark.parametrize("axis", ["tp", "cp", "pp"])
def test_memory_falls_with_more_ranks(axis):
    def fullest(size):
        sizes = ParallelSizes(**{axis: size}, sequence_parallel=axis == "tp" and size > 1)
        stages = memory(module(), sizes=sizes, settings=TrainingSettings())
        return max(
            stage.total(live_tasks=live_tasks(index, num_stages=sizes.pp, num_microbatches=8))
            for index, stage in enumerate(stages)
        )

    assert fullest(1) > fullest(2) > fullest(4) > fullest(8)


def test_memory_of_llama_70b_with_12_layers_is_the_measured_one():
    layer = Layer(
        mixer=SelfAttention(num_heads=64, num_query_groups=8, head_dim=128),
        mlp=Mlp(ffn_hidden_size=28672),
    )
    spec = module(layer, hidden_size=8192, layers=12)
    sizes = ParallelSizes(pp=2, dp=4)

    first, last = memory(spec, sizes=sizes, settings=TrainingSettings())

    # SimuMax, docs/b200/b200_release_v1.2_summary.json (4dcaae5), tp1 pp2 dp4: 66.55 and 62.97.
    assert first.total(live_tasks=2) / GIB == pytest.approx(66.55, rel=0.01)
    assert last.total(live_tasks=1) / GIB == pytest.approx(62.97, rel=0.01)
