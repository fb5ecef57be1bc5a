"""The benchmark of attention runs on a host, small."""

import json

import pytest

from benchmarks.attention_gpu import FLOPS_PER_PAIR, main
from benchmarks.attention_masks import PRESETS


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_dry_run_measures_every_arm_under_every_mask(tmp_path, capsys):
    output = tmp_path / "attention.json"

    main(["--dry-run", "--lengths", "130", "--output", str(output)])

    results = json.loads(output.read_text())
    assert [row["preset"] for row in results["masks"]] == list(PRESETS)
    causal = results["masks"][0]
    assert causal["visible_pairs"] == 130 * 131 // 2
    for row in results["masks"]:
        assert list(row["arms"]) == ["mosaic", "flex", "dense_sdpa", "causal_flash", "mosaic_again"]
        for name, arm in row["arms"].items():
            assert arm["failed"] is None, f"{name}: {arm['failed']}"
            # 4 heads of 16 channels.
            pairs = 130 * 131 // 2 if name == "causal_flash" else row["visible_pairs"]
            flops = FLOPS_PER_PAIR * 4 * 16 * pairs
            assert arm["flops_per_s"] == pytest.approx(flops / arm["median_s"])
        rates = {name: arm["flops_per_s"] for name, arm in row["arms"].items()}
        assert row["of_causal"] == pytest.approx(rates["mosaic"] / rates["causal_flash"])
        (group,) = row["ranks"]
        assert group["cp"] == 2
        for method in ("zigzag", "balanced"):
            assert group[method]["failed"] == []
            times_s = group[method]["median_s"]
            assert group[method]["slowest_of_mean"] == pytest.approx(
                2 * max(times_s) / sum(times_s)
            )
    assert len(capsys.readouterr().out.splitlines()) == 5
