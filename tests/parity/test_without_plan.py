"""Without a plan Megatron is untouched: the same bits."""

import numpy as np

from tests.parity.record import OPTIMIZERS, record_stock
from tests.ranks import run_ranks

OPTIONS = [*OPTIMIZERS["adam"], "--images", "ragged"]


def _stock(rank: int):
    return record_stock(rank, OPTIONS, by_name=False)


def _attached(rank: int):
    """The same script as ``megatron_mosaic.run`` starts it, and with the patches' imports."""
    from megatron_mosaic.host.cpu import run_on_cpu

    run_on_cpu()
    import megatron
    from megatron.training import arguments

    from megatron_mosaic.host.arguments import parse_and_validate_args
    from megatron_mosaic.host.training import pretrain

    arguments.parse_and_validate_args = parse_and_validate_args
    megatron.training.pretrain = pretrain
    return record_stock(rank, OPTIONS, by_name=False)


def test_weights_without_a_plan_are_those_of_stock_megatron():
    (stock,) = run_ranks(_stock, 1, init=False, timeout_s=120)
    (attached,) = run_ranks(_attached, 1, init=False, timeout_s=120)

    assert attached.losses == stock.losses
    for name, shard in stock.weights[-1].items():
        np.testing.assert_array_equal(attached.weights[-1][name].values, shard.values, name)
