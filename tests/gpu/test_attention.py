"""The kernel of a GPU against the exact one, with the gradients that merged parts need."""

import pytest
import torch

from megatron_mosaic.attention.dense import DenseKernel
from megatron_mosaic.attention.flex import FlexKernel
from megatron_mosaic.attention.needed import NeededKeys
from megatron_mosaic.attention.operator import multimodal_attention
from megatron_mosaic.attention.part import Part
from megatron_mosaic.tokens.held import Held
from tests.attention.cases import Case, difference, reference

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False"
    ),
    # torch's compiler warns of what it could do faster.
    pytest.mark.filterwarnings("default"),
]

GPU = torch.device("cuda")
BF16_BOUND = 1e-2  # some roundings of 2 ** -9 each
TF32_BOUND = 2e-3  # products of single precision may be rounded to 10 bits
CASE = Case(preset="encoder_embedded", length=2176, heads=4, groups=2, head_dim=64)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, TF32_BOUND), (torch.bfloat16, BF16_BOUND)], ids=str
)
@pytest.mark.parametrize("preset", ["causal", "prefix_lm", "encoder_embedded", "multimodal_packed"])
def test_attention_on_a_gpu_equals_the_dense_mask(preset, dtype, bound):
    case = Case(preset=preset, length=2176, heads=4, groups=2, head_dim=64, dtype=dtype)
    *tensors, grad = (each.to(GPU) for each in case.tensors())
    leaves = [each.requires_grad_() for each in tensors]

    out = multimodal_attention(*leaves, masks=case.masks())
    out.backward(grad)

    found = [out.detach(), *(leaf.grad for leaf in leaves)]
    for tensor, expected in zip(found, reference(case), strict=True):
        assert difference(tensor.cpu(), expected) < bound


def test_attention_on_a_gpu_computes_the_same_bits_again():
    def run():
        *tensors, grad = (each.to(GPU, torch.bfloat16) for each in CASE.tensors())
        leaves = [each.requires_grad_() for each in tensors]
        out = multimodal_attention(*leaves, masks=CASE.masks())
        out.backward(grad)
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    assert all(map(torch.equal, run(), run()))


@pytest.mark.parametrize("keys", ["own", "received"])
def test_kernel_of_a_part_has_the_gradients_of_the_exact_one(keys):
    masks, assignments = CASE.masks(), CASE.assignments(4)
    queries: list[Held] = [each.held(1) for each in assignments]
    held = queries
    if keys == "received":
        samples = zip(masks, assignments, strict=True)
        held = [NeededKeys.of(*each).received(1) for each in samples]
    part = Part(
        masks=masks,
        queries=queries,
        query_slots=max(each.size for each in queries),
        keys=held,
        key_slots=max(each.size for each in held) + 3,
        device=GPU,
    )
    generator = torch.Generator(device=GPU).manual_seed(0)
    shapes = [(2, 4, part.query_slots, 64), *[(2, 2, part.key_slots, 64)] * 2]
    tensors = [torch.randn(shape, generator=generator, device=GPU) for shape in shapes]
    grad = torch.randn(shapes[0], generator=generator, device=GPU)

    def gradients(kernel):
        leaves = [each.clone().requires_grad_() for each in tensors]
        out, lse = kernel.attend(*leaves, scale=0.125)
        seen = lse.detach() > -torch.inf
        # As merging does: gradients of the output and of the logarithm where anything is seen.
        grads = (grad.to(out.dtype), grad[..., 0] * seen)
        return [out.detach(), *torch.autograd.grad((out, lse), leaves, grads)]

    found = gradients(FlexKernel(part=part))

    for tensor, expected in zip(found, gradients(DenseKernel(part=part)), strict=True):
        assert tensor.isfinite().all()
        assert difference(tensor, expected.double()) < TF32_BOUND
