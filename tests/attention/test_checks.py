import pytest
import torch

from megatron_mosaic.attention.operator import multimodal_attention
from megatron_mosaic.errors import LayoutError
from megatron_mosaic.tokens.assign import contiguous
from megatron_mosaic.tokens.assignment import SequenceCut
from megatron_mosaic.tokens.presets import preset_mask

MASK = preset_mask("causal", length=10)


def assignment(*, length=10, cp=1):
    cut = SequenceCut(length=length, cp=cp, block=5)
    return contiguous(cut)


def attend(*, query=(10, 1, 4, 8), key=(10, 1, 2, 8), dtype=torch.float32, **options):
    tensors = [torch.zeros(query, dtype=dtype), torch.zeros(key), torch.zeros(key)]
    return multimodal_attention(*tensors, **{"masks": [MASK], **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, r"dropout=0.1 must be 0 .*--attention-dropout 0"),
        ({"exchange": "ring"}, r"exchange=ring must be one of auto, blocks, all_gather"),
        ({"masks": [MASK, MASK]}, r"masks=2 must be one for each of the 1 samples"),
        ({"assignments": []}, r"assignments=0 must be one for each of the 1 samples"),
        ({"assignments": [assignment(cp=2)]}, r"cp=2 of an assignment must be the group's size 1"),
        (
            {"assignments": [assignment(length=9)]},
            r"length=9 of an assignment must be its mask's length 10",
        ),
        ({"query": (9, 1, 4, 8), "key": (9, 1, 2, 8)}, r"slots=9 must be >= 10 tokens of a rank"),
        ({"key": (10, 1, 3, 8)}, r"heads=4 must be a multiple of query groups=3"),
        ({"key": (9, 1, 2, 8)}, r"key=\(9, 1, 2, 8\), .* must be \(10, 1, 2, 8\)"),
        ({"query": (10, 1, 4, 264)}, r"head_dim=264 must be <= 256"),
        ({"dtype": torch.float64}, r"dtype=torch.float64, torch.float32, .* must be one of bf16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_operator_refuses_what_does_not_fit_in_one_line(options, message):
    with pytest.raises(LayoutError, match=message) as error:
        attend(**options)

    assert "\n" not in str(error.value)


def test_backward_runs_with_padding_alone():
    # No document at all: every token is padding.
    mask = preset_mask("multimodal_packed", length=10, document_stops=[])
    query, key, value = (torch.ones(10, 1, 1, 8, requires_grad=True) for _ in range(3))

    multimodal_attention(query, key, value, masks=[mask]).sum().backward()

    for leaf in (query, key, value):
        assert leaf.grad is not None
        assert leaf.grad.tolist() == torch.zeros(10, 1, 1, 8).tolist()
