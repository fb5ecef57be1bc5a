"""What a real GPU says of operations on parts of it."""

import pytest
import torch

from megatron_mosaic.cli import main
from megatron_mosaic.cluster.cluster_file import read_cluster
from megatron_mosaic.cluster.shipped import load_cluster, shipped_clusters

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False"
    ),
    # torch warns that green contexts may change.
    pytest.mark.filterwarnings("default"),
]


def test_profile_measures_a_shared_gpu(tmp_path, capsys):
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    alike = [name for name in shipped_clusters() if load_cluster(name).gpu.num_sms == num_sms]
    if not alike:
        pytest.skip(f"no shipped GPU has {num_sms} multiprocessors")
    shared = tmp_path / "shared.yaml"

    assert main(["profile", str(shared), "--quick", "--sharing", "--base", alike[0]]) == 0

    sharing = read_cluster(shared).gpu.sharing
    assert sharing is not None
    assert 0.1 < sharing.bandwidth_knee <= 1
    assert "profile --sharing" in sharing.source
    assert "mean error beside others" in capsys.readouterr().out
    # About half of the multiprocessors multiply slower than all, not at a tenth of the rate.
    rates = sharing.rates["matmul"]
    half = min(rates, key=lambda sms: abs(sms - num_sms / 2))
    assert 0.1 < rates[half] < 0.95
