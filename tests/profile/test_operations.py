import pytest
import torch

from megatron_mosaic.profile.operations import Sizes, num_operations, operations

CPU = torch.device("cpu")
TINY = Sizes(matmul=(4,), sequence=(3,), values=(8, 16), heads=2)


def _by_curve():
    return {operation.curve: operation for operation in operations(CPU, TINY)}


def test_operations_of_a_cpu_are_in_the_precisions_that_it_trains_in():
    # Per precision a multiplication and two passes of attention; two additions, one optimizer step.
    assert num_operations(CPU, TINY) == 2 * 3 + 2 + 1
    assert sorted(_by_curve()) == [
        "attention.backward.bf16",
        "attention.backward.fp32",
        "attention.forward.bf16",
        "attention.forward.fp32",
        "elementwise",
        "matmul.bf16",
        "matmul.fp32",
        "optimizer",
    ]


@pytest.mark.parametrize(
    ("curve", "size"),
    [
        ("matmul.fp32", 128),  # 2 * 4^3
        # 3 * 4 / 2 = 6 pairs, 2 heads, 128 values, two multiplications of 2 FLOPs.
        ("attention.forward.bf16", 6144),
        ("attention.backward.bf16", 15360),  # 2.5 times as many
        ("elementwise", 96),  # 16 values of 2 + 2 + 2 bytes
        ("optimizer", 224),  # 8 values of 4 * 4 bytes read and 3 * 4 written
    ],
)
def test_size_of_an_operation_is_what_it_works(curve, size):
    assert _by_curve()[curve].size == size


@pytest.mark.parametrize("curve", sorted(_by_curve()))
def test_operation_runs_again_and_again(curve):
    run = _by_curve()[curve].prepare()

    run()
    run()


def test_optimizer_step_changes_the_weights():
    step = _by_curve()["optimizer"].prepare()
    weight = step.__self__.param_groups[0]["params"][0]
    before = weight.detach().clone()

    step()

    assert not torch.equal(weight, before)
