"""Runs a script of the tests on one rank and records gradients, weights and losses of each step."""

from collections.abc import Callable

from megatron_mosaic.rehearsal import record
from megatron_mosaic.rehearsal.record import Record, initialized_by_name

__all__ = [
    "ARGUMENTS",
    "OPTIMIZERS",
    "Record",
    "initialized_by_name",
    "record_plan",
    "record_stock",
]

ARGUMENTS = [
    "--encoder-num-layers",
    "2",
    "--decoder-num-layers",
    "4",
    "--hidden-size",
    "32",
    "--num-attention-heads",
    "4",
    "--ffn-hidden-size",
    "64",
    "--seq-length",
    "8",
    "--max-position-embeddings",
    "64",
    "--position-embedding-type",
    "rope",
    "--img-h",
    "28",
    "--img-w",
    "28",
    "--patch-dim",
    "14",
    "--disable-vision-class-token",
    "--normalization",
    "RMSNorm",
    "--train-iters",
    "4",
    "--lr",
    "1e-2",
    "--lr-decay-style",
    "constant",
    "--weight-decay",
    "0.01",
    "--clip-grad",
    "1.0",
    "--attention-dropout",
    "0",
    "--hidden-dropout",
    "0",
    # After step 3, and twice at the end: of validation and of test data.
    "--eval-interval",
    "3",
    "--eval-iters",
    "1",
    "--log-interval",
    "1",
    "--tokenizer-type",
    "NullTokenizer",
    "--vocab-size",
    "61",
    "--make-vocab-size-divisible-by",
    "16",
    "--transformer-impl",
    "local",
    "--disable-bias-linear",
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-bias-dropout-fusion",
    "--no-bias-gelu-fusion",
    "--no-bias-swiglu-fusion",
    "--no-rope-fusion",
    "--no-persist-layer-norm",
    "--split",
    "100,0,0",
    "--num-workers",
    "0",
    "--micro-batch-size",
    "2",
    "--global-batch-size",
    "16",
]
OPTIMIZERS = {
    "sgd": ["--optimizer", "sgd", "--sgd-momentum", "0.9"],
    # At the default eps of 1e-8 Adam turns the rounding noise of tiny gradients into full steps.
    "adam": ["--optimizer", "adam", "--adam-eps", "1e-4", "--lr", "1e-3"],
}


def record_plan(
    rank: int,
    plan_path: str,
    options: list[str],
    faults: tuple[str, ...] = (),
    script: str = "vlm_script",
    *,
    on_cpu: bool = True,
    lane: Callable[[], str] = lambda: "",
) -> Record:
    """Trains under a plan. Called on every rank."""

    def break_runtime() -> None:
        from tests.parity.faults import plant

        for fault in faults:
            plant(fault, rank)

    arguments = [*ARGUMENTS, *options, "--mosaic-plan", plan_path]
    return record.record_plan(
        f"tests.parity.{script}", arguments, on_cpu=on_cpu, lane=lane, before=break_runtime
    )


def record_stock(
    rank: int, options: list[str], script: str = "vlm_script", *, by_name: bool = True
) -> Record:
    """Trains under stock Megatron in one process, from the same initial weights."""
    arguments = [*ARGUMENTS, *options]
    return record.record_stock(f"tests.parity.{script}", arguments, by_name=by_name)
