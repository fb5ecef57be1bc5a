import pytest
import torch

from megatron_mosaic.profile import operations as operations_module
from megatron_mosaic.profile.operations import Sizes, _adam, num_operations, operations

CPU = torch.device("cpu")
TINY = Sizes(square=(4,), rows=(2,), wide=(4, 8), experts=3, sequence=(3,), heads=2, values=(8, 16))


def _by_curve():
    return {operation.curve: operation for operation in operations(CPU, TINY)}


def test_operations_of_a_cpu_are_in_the_precisions_that_it_trains_in():
    # In each precision three multiplications, as many gradients of weights, and experts with
    # weights of the smaller size; two passes of attention, two additions, two permutations, and
    # one step of the optimizer.
    assert num_operations(CPU, TINY) == 2 * (3 + 3 + 1) + 2 + 2 + 2 + 1
    assert sorted(_by_curve()) == [
        "attention.backward",
        "attention.forward",
        "elementwise",
        "grouped_matmul.bf16",
        "grouped_matmul.fp32",
        "matmul.bf16",
        "matmul.fp32",
        "optimizer",
        "permute",
        "weight_gradient.matmul.bf16",
        "weight_gradient.matmul.fp32",
    ]


@pytest.mark.parametrize(
    ("curve", "size", "smallest"),
    [
        ("matmul.fp32", 256, 2),  # the last one, 2 * 2 * 8 * 8
        ("weight_gradient.matmul.bf16", 256, 2),
        ("grouped_matmul.bf16", 192, 2),  # three experts, 2 * 2 * 4 * 4 each
        # 3 * 4 / 2 = 6 pairs, 2 heads, 128 values, two multiplications of 2 FLOPs.
        ("attention.forward", 6144, 0),
        ("attention.backward", 15360, 0),  # 2.5 times as many
        ("elementwise", 96, 0),  # 16 values of 2 + 2 + 2 bytes
        ("permute", 64, 0),  # 16 values of 2 + 2 bytes
        ("optimizer", 224, 0),  # 8 values of 4 * 4 bytes read and 3 * 4 written
    ],
)
def test_size_of_an_operation_is_what_it_works(curve, size, smallest):
    operation = _by_curve()[curve]

    assert (operation.size, operation.smallest) == (size, smallest)


@pytest.mark.parametrize("curve", sorted(_by_curve()))
def test_operation_runs_again_and_again(curve):
    run = _by_curve()[curve].prepare()

    run()
    run()


def test_optimizer_step_changes_the_weights():
    step = _adam(8, CPU)
    weight = step.__self__.param_groups[0]["params"][0]
    before = weight.detach().clone()

    step()

    assert not torch.equal(weight, before)


def test_tensors_of_what_memory_bounds_do_not_fit_into_the_cache(monkeypatch):
    monkeypatch.setattr(operations_module, "_cache_bytes", lambda device: 1000)
    made = []
    monkeypatch.setattr(operations_module, "_add", lambda *sizes: made.append(sizes) or list)

    _by_curve()["elementwise"].prepare()

    # 96 bytes each: twenty of them are twice the cache, and the first is not met again.
    assert len(made) == 21
