from functools import cache
from types import SimpleNamespace

import pytest

from megatron_mosaic.sharing.guards import Environment, objections, shares_workspace

HOPPER = (9, 0)
BLACKWELL = (10, 0)


def only(**facts):
    (line,) = objections(Environment(**facts))
    assert "\n" not in line
    return line


def test_nothing_speaks_against_a_plain_run():
    assert objections(Environment()) == ()
    assert objections(Environment(compute_capability=HOPPER)) == ()


@pytest.mark.parametrize("capability", [(8, 0), HOPPER])
def test_model_parallelism_before_blackwell_forbids_sharing(capability):
    line = only(
        compute_capability=capability,
        model_parallel=("vision", "language"),
        device_max_connections="1",
    )

    assert line.startswith("modules vision, language: tensor_model_parallel_size and context_")
    assert "Megatron forces CUDA_DEVICE_MAX_CONNECTIONS=1 there" in line
    assert line.endswith("use data or pipeline parallelism, or kind=colocated")


@pytest.mark.parametrize("capability", [BLACKWELL, (12, 0), None])
def test_model_parallelism_may_share_blackwell_and_a_host(capability):
    assert objections(Environment(compute_capability=capability, model_parallel=("v",))) == ()


@pytest.mark.parametrize("capability", [HOPPER, BLACKWELL])
def test_one_hardware_queue_forbids_sharing(capability):
    line = only(compute_capability=capability, device_max_connections="1")

    assert line.startswith("environment: CUDA_DEVICE_MAX_CONNECTIONS=1 must be > 1")
    assert line.endswith("unset it or use 8")


@pytest.mark.parametrize("connections", ["8", "32", None])
def test_several_hardware_queues_let_modules_share(connections):
    facts = Environment(compute_capability=HOPPER, device_max_connections=connections)

    assert objections(facts) == ()


def test_one_hardware_queue_says_nothing_about_a_host():
    assert objections(Environment(device_max_connections="1")) == ()


def test_blocking_launches_forbid_sharing():
    line = only(compute_capability=HOPPER, launch_blocking=True)

    assert "CUDA_LAUNCH_BLOCKING=1 must be unset" in line


def test_waiting_after_each_transfer_forbids_sharing():
    assert only(batch_p2p_sync=True).endswith("set batch_p2p_sync=False")


def test_fp8_forbids_sharing():
    assert only(fp8=True).endswith("use bf16")


def test_shared_workspace_forbids_sharing():
    assert only(shared_workspace=True).endswith("use --transformer-impl local")


@pytest.mark.parametrize(
    ("gemm", "shared"),
    [
        (SimpleNamespace(), True),  # TransformerEngine 1.x: it is elsewhere, one for the process
        (SimpleNamespace(get_cublas_workspace=cache(lambda device: [device])), True),
        (SimpleNamespace(get_cublas_workspace=lambda device: [device]), False),
    ],
)
def test_workspace_is_shared_where_it_is_kept(gemm, shared):
    assert shares_workspace(gemm) is shared


def test_collectives_need_as_many_sms_as_thread_blocks():
    line = only(compute_capability=BLACKWELL, collectives={"vision": 16, "language": 116})

    assert line.startswith("lane vision: share.sms=16 must be >= NCCL_MAX_CTAS=32")
    assert line.endswith("set NCCL_MAX_CTAS=16 or raise the quota")


@pytest.mark.parametrize("facts", [{"nccl_max_ctas": 16}, {"compute_capability": None}])
def test_collectives_fit_into_a_lane_with_fewer_thread_blocks_or_on_a_host(facts):
    capability = {"compute_capability": BLACKWELL} | facts

    assert objections(Environment(collectives={"vision": 16}, **capability)) == ()


def test_every_objection_is_listed():
    found = objections(
        Environment(
            compute_capability=HOPPER, fp8=True, shared_workspace=True, device_max_connections="1"
        )
    )

    assert len(found) == 3
