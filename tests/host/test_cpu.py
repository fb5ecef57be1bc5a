import subprocess
import sys
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch

from megatron_mosaic.errors import LayoutError
from megatron_mosaic.host.cpu import cpu_wanted
from megatron_mosaic.host.cpu.devices import cpu_if_cuda
from megatron_mosaic.host.cpu.optimizer import FusedAdam
from megatron_mosaic.host.norm import LocalNorm
from tests.ranks import run_ranks

ARGUMENTS = (  # noqa: SIM905 - a command line
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 8 "
    "--max-position-embeddings 8 --attention-dropout 0.1 --hidden-dropout 0.1 "
    "--tokenizer-type NullTokenizer --vocab-size 31 --make-vocab-size-divisible-by 8 "
    "--micro-batch-size 1 --global-batch-size 4 --train-iters 4 --lr 0.01 "
    "--lr-decay-style constant --eval-iters 0 --eval-interval 9 --num-workers 0 "
    "--transformer-impl local --no-gradient-accumulation-fusion --ckpt-format torch_dist"
).split()


def test_import_of_the_switch_leaves_torch_and_megatron_alone():
    code = (
        "import sys; import megatron_mosaic.host.cpu; "
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'megatron'}))"
    )

    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert output.stdout.strip() == "[]"


@pytest.mark.parametrize(("device", "wanted"), [("cpu", True), ("cuda", False)])
def test_cpu_is_wanted_as_the_user_asks(device, wanted):
    assert cpu_wanted(device) is wanted


@pytest.mark.parametrize("has_gpu", [True, False])
def test_cpu_is_wanted_without_a_gpu_if_nobody_asks(monkeypatch, has_gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)

    assert cpu_wanted(None) is not has_gpu


@pytest.mark.parametrize("device", ["cuda", "cuda:3", 0, torch.device("cuda", 1)])
def test_cuda_device_is_translated_in_every_spelling(device):
    assert cpu_if_cuda(device) == torch.device("cpu")


@pytest.mark.parametrize("device", [None, "meta", torch.device("meta"), torch.float32])
def test_other_devices_are_not_translated(device):
    assert cpu_if_cuda(device) is device


def test_second_switch_changes_nothing():
    run_ranks(_check_second_switch, 1)


def _check_second_switch(rank):
    from megatron_mosaic.host.cpu import run_on_cpu

    before = (torch.empty, torch.cuda.Stream, torch.distributed.new_group, torch.Tensor.to)
    run_on_cpu()

    assert before == (torch.empty, torch.cuda.Stream, torch.distributed.new_group, torch.Tensor.to)


def test_tensors_made_on_cuda_are_on_cpu():
    run_ranks(_check_tensors, 1)


def _check_tensors(rank):
    ones = torch.ones(2, device="cuda", pin_memory=True)
    with torch.device(torch.cuda.current_device()):
        in_context = torch.zeros(2)

    for tensor in (ones, ones.cuda(), ones.to(0), ones.new_zeros(2, device="cuda"), in_context):
        assert tensor.device == torch.device("cpu")
    assert torch.nn.Linear(2, 2).cuda().weight.type() == "torch.cuda.FloatTensor"


def test_nccl_groups_are_gloo_groups():
    assert run_ranks(_group_backends, 2, init=False) == [("gloo", "gloo")] * 2


def _group_backends(rank):
    torch.distributed.init_process_group("nccl", device_id=torch.device("cuda", rank))
    group = torch.distributed.new_group([0, 1], backend="nccl")
    torch.distributed.barrier(group, device_ids=[rank])
    return torch.distributed.get_backend(), torch.distributed.get_backend(group)


def test_uneven_all_to_all_takes_split_sizes_as_tensors():
    # Rank 0 keeps one row and sends two, rank 1 sends one and keeps none.
    assert run_ranks(_exchange, 2) == [[0.0, 10.0], [1.0, 2.0]]


def _exchange(rank):
    rows = torch.arange(3.0) if rank == 0 else torch.tensor([10.0])
    sent = torch.tensor([[1, 2], [1, 0]])
    received = torch.empty(2)
    torch.distributed.all_to_all_single(received, rows, sent[:, rank], sent[rank])
    return received.tolist()


def test_parts_of_unequal_size_are_gathered():
    assert run_ranks(_gather_unevenly, 2) == [[1.0, 1.0, 10.0]] * 2


def _gather_unevenly(rank):
    own = torch.tensor([[1.0, 1.0], [10.0]][rank])
    parts = [torch.empty(2), torch.empty(1)]
    torch.distributed.all_gather(parts, own, group=torch.distributed.group.WORLD)
    return torch.cat(parts).tolist()


def test_parts_of_unequal_size_are_summed_and_scattered():
    # Rank 0 owns the first two of 1 + 10, 2 + 20, 3 + 30, and rank 1 the last.
    assert run_ranks(_scatter_unevenly, 2) == [[11.0, 22.0], [33.0]]


def _scatter_unevenly(rank):
    parts = list((torch.tensor([1.0, 2.0, 3.0]) * (1, 10)[rank]).split([2, 1]))
    own = torch.empty_like(parts[rank])
    torch.distributed.reduce_scatter(own, parts, group=torch.distributed.group.WORLD)
    return own.tolist()


def test_data_loader_leaves_the_random_numbers_of_the_model_alone():
    with_loader, without_loader = run_ranks(_draw_beside_a_loader, 2)

    assert with_loader == without_loader


def _draw_beside_a_loader(rank):
    torch.manual_seed(7)
    if rank == 0:
        data = torch.utils.data.DataLoader(_RandomData(), batch_size=1, shuffle=True)
        draws = [batch.item() for batch in data]
        assert len(set(draws)) == 4  # its own numbers go on from one batch to the next
    return torch.rand(3).tolist()


class _RandomData(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.rand(1)


def test_local_attention_takes_unpacked_and_padded_sequences():
    run_ranks(_check_attention, 1)


def _check_attention(rank):
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType

    query, key, value = torch.randn(3, 5, 2, 2, 4)  # [q/k/v, s, b, heads, h]
    causal = _attention(AttnMaskType.causal)(query, key, value, None)
    padded = _attention(AttnMaskType.padding_causal)
    unpacked = PackedSeqParams(qkv_format="sbhd")

    torch.testing.assert_close(padded(query, key, value, None, packed_seq_params=unpacked), causal)
    with pytest.raises(AssertionError, match="Packed sequence is not supported"):
        padded(query, key, value, None, packed_seq_params=PackedSeqParams(qkv_format="thd"))


def _attention(attn_mask_type):
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()
        model_parallel_cuda_manual_seed(1, tp_rank=0, ep_rank=0, etp_rank=0)
    return DotProductAttention(
        TransformerConfig(
            num_layers=1, hidden_size=8, num_attention_heads=2, attention_dropout=0.0
        ),
        1,
        attn_mask_type,
        "self",
        pg_collection=ProcessGroupCollection(tp=torch.distributed.group.WORLD),
    )


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_updates_as_torch_does(decoupled):
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(2))]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.2}
    torch_adam = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizers = [
        FusedAdam(ours, adam_w_mode=decoupled, **settings),
        torch_adam(theirs, **settings),
    ]

    for _ in range(3):
        for optimizer, parameters in zip(optimizers, (ours, theirs), strict=True):
            optimizer.zero_grad()
            sum((parameter**4).sum() for parameter in parameters).backward()
            optimizer.step()

    torch.testing.assert_close(ours, theirs)


def test_adam_keeps_its_step_in_the_group_even_without_parameters():
    optimizer = FusedAdam([{"params": []}, {"params": [torch.nn.Parameter(torch.ones(1))]}])

    optimizer.step()

    assert [group["step"] for group in optimizer.state_dict()["param_groups"]] == [1, 1]


@pytest.mark.parametrize(
    ("normalization", "theirs"), [("LayerNorm", torch.nn.LayerNorm), ("RMSNorm", torch.nn.RMSNorm)]
)
@pytest.mark.parametrize("zero_centered", [False, True])
def test_norm_equals_that_of_torch(normalization, theirs, zero_centered):
    x = torch.randn(3, 2, 4)
    config = _norm_config(normalization=normalization, layernorm_zero_centered_gamma=zero_centered)

    torch.testing.assert_close(LocalNorm(config, 4, eps=1e-3)(x), theirs(4, eps=1e-3)(x))


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norm_marks_its_parameters_for_sequence_parallel(sequence_parallel):
    norm = LocalNorm(_norm_config(sequence_parallel=sequence_parallel), 4)

    assert [p.sequence_parallel for p in norm.parameters()] == [sequence_parallel] * 2


def test_norm_rejects_other_normalizations():
    with pytest.raises(LayoutError, match=r"normalization='L2Norm' must be LayerNorm or RMSNorm"):
        LocalNorm(_norm_config(normalization="L2Norm"), 4)


def _norm_config(**fields):
    defaults = {
        "normalization": "LayerNorm",
        "layernorm_zero_centered_gamma": False,
        "sequence_parallel": False,
        "params_dtype": torch.float32,
    }
    return SimpleNamespace(**(defaults | fields))


def test_pretrain_with_sequence_parallel_keeps_replicated_weights_equal():
    sequence_parallel = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]

    first, second = run_ranks(_train, 2, [*ARGUMENTS, *sequence_parallel], init=False)

    replicated = [name for name in first if "layernorm" in name or "position" in name]
    assert len(replicated) == 11  # position embedding, 2 * 2 + 1 norms of weight and bias
    for name in replicated:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)


def test_resumed_pretrain_with_distributed_optimizer_equals_an_uninterrupted_one(tmp_path):
    whole = [*ARGUMENTS, "--use-distributed-optimizer", "--overlap-grad-reduce"]
    half = [*whole, "--save", str(tmp_path), "--save-interval", "2", "--exit-interval", "2"]
    expected = run_ranks(_train, 2, whole, init=False)
    run_ranks(_train, 2, half, init=False)

    resumed = run_ranks(_train, 2, [*whole, "--load", str(tmp_path)], init=False)

    torch.testing.assert_close(resumed, expected, rtol=0, atol=0)


def _train(rank, arguments):
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    sys.argv = ["pretrain", *arguments]
    config = pretrain_cfg_container_from_args(parse_and_validate_args())
    models = []

    def provide_model(**kwargs):
        models.append(_gpt(kwargs["pre_process"], kwargs["post_process"]))
        return models[-1]

    data = [torch.randint(31, (9,), generator=torch.Generator().manual_seed(i)) for i in range(16)]
    kind = ModelType.encoder_or_decoder
    with suppress(SystemExit):  # upstream's way to end at --exit-interval
        pretrain(config, lambda _: (data, None, None), kind, _forward_step, provide_model)
    return {name: weight.detach() for name, weight in models[0].named_parameters()}


def _gpt(pre_process, post_process):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    args = get_args()
    return GPTModel(
        config=core_transformer_config_from_args(args),
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.seq_length,
        pre_process=pre_process,
        post_process=post_process,
    )


def _forward_step(data_iterator, model):
    from megatron.core.tensor_parallel import broadcast_data

    batch = {"text": next(data_iterator)} if data_iterator is not None else None
    text = broadcast_data(["text"], batch, torch.int64)["text"]
    positions = torch.arange(8, device="cuda").expand(len(text), -1)
    losses = model(text[:, :-1], positions, None, labels=text[:, 1:])

    def loss(output):
        mean = output.float().mean()
        return mean, {"lm loss": mean.detach()}

    return losses, loss
