from types import SimpleNamespace

import pytest
import torch

from megatron_mosaic.errors import HostError, PlanError
from megatron_mosaic.layout.placement import ModulePlacement
from tests.ranks import run_ranks


def _refusal(rank, cp, stages, kind, virtual):
    from megatron_mosaic.host.families.llava_vision import check_splittable

    placement = ModulePlacement(
        name="vision",
        ranks=tuple(range(cp * stages)),
        context_parallel_size=cp,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=virtual,
    )
    arguments = {"vision_transformer_config": SimpleNamespace(vision_model_type=kind)}
    arguments |= {"pixel_shuffle": True, "tile_tags": None}
    with pytest.raises(PlanError, match="must be 1") as caught:
        check_splittable(arguments, SimpleNamespace(placement=placement))
    return str(caught.value)


@pytest.mark.parametrize(
    ("cp", "stages", "kind", "virtual", "shown"),
    [
        (2, 4, "clip", 1, "context_parallel_size=2 must be 1 with pixel_shuffle"),
        (2, 4, "radio", 1, "context_parallel_size=2 must be 1 for vision_model_type=radio"),
        (1, 4, "radio", 1, "pipeline_model_parallel_size=4 must be 1 for vision_model_type=radio"),
        (1, 1, "radio", 2, "virtual_pipeline_model_parallel_size=2 must be 1 for vision_model_ty"),
    ],
)
def test_refused_split_of_a_vision_model_shows_the_size_that_was_planned(
    cp, stages, kind, virtual, shown
):
    assert f"modules.vision: {shown}" in run_ranks(_refusal, 1, cp, stages, kind, virtual)[0]


def _give_a_mask(rank):
    from megatron_mosaic.host.attention import GatheredKeyValues

    attention = object.__new__(GatheredKeyValues)
    heads = torch.zeros(2, 1, 1, 1)
    with pytest.raises(HostError, match="attention_mask") as caught:
        attention.forward(heads, heads, heads, torch.zeros(1, 1, 4, 4, dtype=torch.bool))
    return str(caught.value)


def test_attention_mask_of_the_script_is_refused_where_ranks_have_parts_of_sequences():
    (message,) = run_ranks(_give_a_mask, 1)

    assert "script: attention_mask=[1, 1, 4, 4] must be None with context parallelism" in message
