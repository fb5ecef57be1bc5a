import pytest

from megatron_mosaic.errors import HostError


@pytest.fixture(autouse=True)
def _on_cpu():
    from megatron_mosaic.host.cpu import run_on_cpu

    run_on_cpu()


def test_every_seam_exists_in_this_megatron():
    from megatron_mosaic.host.seams import SEAMS

    for seam in SEAMS:
        assert seam.resolve() is not None or seam.how == "set"
        assert seam.why


def test_seam_that_another_version_lacks_is_named():
    from megatron_mosaic.host.seams import Seam

    seam = Seam(symbol="megatron.training.training:no_such_thing", how="replaced", why="a test")

    with pytest.raises(HostError, match=r"symbol=megatron.training.training:no_such_thing must"):
        seam.resolve()


def test_seam_with_other_parameters_is_named():
    from megatron_mosaic.host.seams import Seam

    seam = Seam(
        symbol="megatron.training.training:evaluate",
        how="argument",
        parameters=("config", "colour"),
        why="a test",
    )

    with pytest.raises(HostError, match=r"evaluate must take \['colour'\]"):
        seam.resolve()


def test_replaced_symbols_come_back_when_the_scope_fails():
    from megatron.training import training

    from megatron_mosaic.host.seams import replaced

    stock = training.get_forward_backward_func
    symbol = "megatron.training.training:get_forward_backward_func"

    def fail_inside() -> None:
        with replaced({symbol: len}):
            assert training.get_forward_backward_func is len
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail_inside()

    assert training.get_forward_backward_func is stock
