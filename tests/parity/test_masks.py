"""The parity of plans with masks (``tests/plans/mask_*.yaml``) can see what it is there to see."""

from pathlib import Path

from tests.parity.training import compared, options_of, trained

PLAN = Path(__file__).parent.parent / "plans" / "mask_embedded_pp2.yaml"


def test_another_mask_than_the_plans_is_seen():
    options = ["causal" if option == "encoder_embedded" else option for option in options_of(PLAN)]

    result = compared(trained(PLAN, "sgd"), PLAN, "sgd", options)

    assert any(line.startswith("losses ") for line in result.failures)
    assert any(line.startswith("gradient ") for line in result.failures)
