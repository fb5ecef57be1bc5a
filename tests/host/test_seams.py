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


def _with_a_hook(groups):
    return getattr(groups, "forward_backward_func", None) or len


def _without_a_hook(groups):
    return len


@pytest.mark.parametrize(
    ("function", "patched"), [("_with_a_hook", True), ("_without_a_hook", False)]
)
def test_function_is_patched_if_it_asks_for_the_hook(function, patched):
    from megatron_mosaic.host.seams import Seam

    seam = Seam(
        symbol=f"{__name__}:{function}",
        how="replaced",
        hook="forward_backward_func",
        why="a test",
    )

    assert seam.is_patched() is patched


def test_installed_megatron_is_not_patched():
    from megatron_mosaic.host.seams import SEAMS, unpatched

    hooked = {seam.symbol: len for seam in SEAMS if seam.hook}

    assert len(hooked) == 3
    assert unpatched(hooked) == hooked


def test_symbol_without_a_row_is_left_as_it_is():
    from megatron_mosaic.host.seams import unpatched

    assert unpatched({"json:loads": len}) == {"json:loads": len}


def test_patches_have_the_hooks_that_seams_ask_for():
    from megatron_mosaic.host.seams import SEAMS
    from megatron_mosaic.patching.series import known_series

    for series in known_series():
        texts = "".join(patch.text for patch in series.patches)
        for seam in SEAMS:
            assert not seam.hook or f"'{seam.hook}'" in texts, (series.name, seam.hook)
