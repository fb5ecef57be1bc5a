import pytest

from megatron_mosaic.errors import PlanError
from megatron_mosaic.layout.placement import ModulePlacement
from tests.ranks import run_ranks


def _gradient_of_packed_rows(rank):
    """Sends two tensors as one row, uses the first alone, and returns the row's gradient."""
    from types import SimpleNamespace

    import torch
    from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules

    from megatron_mosaic.host.families.mimo_boundary import MimoBoundary
    from megatron_mosaic.host.families.mimo_parts import ModalityPart

    class TwoTensors(VisionModalitySubmodules):
        @staticmethod
        def output_widths(hidden_size):
            return {"tokens": hidden_size, "feature": 1}

    spec = SimpleNamespace(params={"config": SimpleNamespace(hidden_size=2)})
    config = SimpleNamespace(language_model_spec=spec, special_token_ids={"images": -200})
    model = SimpleNamespace(mimo_config=config, post_process=True)
    parts = {"images": ModalityPart(modality="images", submodules=TwoTensors, encoders=("clip",))}
    made = {"feature": torch.tensor([[5.0]]), "tokens": torch.tensor([[3.0, 4.0]])}
    rows = MimoBoundary(model, "images", parts=parts).rows_of({"images": made})
    leaf = rows.detach().requires_grad_()
    received = MimoBoundary(model, "language", parts=parts).inputs_of({"images": leaf})["images"]
    (2 * received["tokens"]).sum().backward()
    return rows.tolist(), received["feature"].tolist(), leaf.grad.tolist()


def test_tensors_travel_side_by_side_and_an_unused_one_has_zero_gradient():
    ((rows, feature, gradient),) = run_ranks(_gradient_of_packed_rows, 1)

    assert rows == [[3.0, 4.0, 5.0]]
    assert feature == [[5.0]]
    assert gradient == [[2.0, 2.0, 0.0]]


@pytest.mark.parametrize(
    ("name", "sizes", "field"),
    [
        ("language", {"context_parallel_size": 2}, "context_parallel_size=2"),
        ("vision", {"pipeline_model_parallel_size": 2}, "vision: pipeline_model_parallel_size=2"),
        (
            "vision",
            {"data_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
            "vision: virtual_pipeline_model_parallel_size=2",
        ),
        (
            "vision",
            {"tensor_model_parallel_size": 2, "sequence_parallel": True},
            "sequence_parallel false",
        ),
    ],
)
def test_sizes_of_other_models_are_refused(name, sizes, field):
    from megatron_mosaic.host.cpu import run_on_cpu

    run_on_cpu()
    from megatron_mosaic.host.families.mimo_parts import check_sizes

    placement = ModulePlacement(name=name, ranks=(0, 1), **sizes)

    with pytest.raises(PlanError, match=field):
        check_sizes(placement)
