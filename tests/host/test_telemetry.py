"""What a real run on real ranks hands to Megatron's writers."""

import sys
from contextlib import redirect_stdout
from importlib.util import find_spec

import pytest

from tests.parity.record import ARGUMENTS, OPTIMIZERS
from tests.ranks import run_ranks

# The last rank, on which Megatron writes, hosts no module. No CPU is as fast as predicted.
PLAN = """
format: 1
world_size: 4
global_batch_size: 16
micro_batch_size: 2
modules:
  vision: {ranks: 1-2, data_parallel_size: 2}
  language: {ranks: 0-1, pipeline_model_parallel_size: 2}
edges: [[vision, language]]
schedule: {kind: colocated, encoder_group: 2}
predicted:
  step_s: 1.0e-03
  peak_flops_per_s: 1.0e+12
  breakdown: {compute_s: 9.0e-04, bubble_s: 5.0e-05, sync_s: 3.0e-05, optimizer_s: 2.0e-05}
  memory_bytes: [{ranks: 0-2, weights: 1.0e+06, activations: 5.0e+05}]
"""


class _Writer:
    """Keeps scalars as TensorBoard's writer would write them, where it is not installed."""

    def __init__(self):
        self.scalars = {}

    def add_scalar(self, name, value, iteration):
        self.scalars.setdefault(name, {})[iteration] = float(value)

    def add_text(self, *unused, **also_unused):
        pass

    def flush(self):
        pass


class _Wandb(_Writer):
    """Keeps what it is told as Weights & Biases would."""

    class config:  # noqa: N801
        @staticmethod
        def update(values):
            pass

    def log(self, values, iteration):
        for name, value in values.items():
            self.add_scalar(name, value, iteration)

    def finish(self):
        pass


def _train(rank, plan_path, options):
    from megatron.training import global_vars

    from megatron_mosaic.host import training
    from megatron_mosaic.host.arguments import parse_and_validate_args
    from megatron_mosaic.host.reports import language_flops
    from tests.parity import vlm_script

    stand_in, wandb = _Writer(), _Wandb()

    def parse(*arguments, **named):
        args = parse_and_validate_args(*arguments, **named)
        if rank == args.world_size - 1:
            global_vars._GLOBAL_WANDB_WRITER = wandb
            if global_vars._GLOBAL_TENSORBOARD_WRITER is None:
                global_vars._GLOBAL_TENSORBOARD_WRITER = stand_in
        return args

    sys.argv = ["script", *ARGUMENTS, *OPTIMIZERS["sgd"], *options, "--mosaic-plan", plan_path]
    vlm_script.main(parse, training.pretrain)
    flops = {"flops": language_flops(global_vars.get_args(), 16, trained={})}
    return [stand_in.scalars, wandb.scalars, flops]


def _events(folder):
    """Scalars of event files, by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        name: {event.step: event.value for event in events.Scalars(name)}
        for name in events.Tags()["scalars"]
    }


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """Six steps, logged at every second one: the writers' scalars, and what was printed."""
    folder = tmp_path_factory.mktemp("telemetry")
    path = folder / "plan.yaml"
    path.write_text(PLAN)
    options = ["--train-iters", "6", "--log-interval", "2", "--images", "ragged"]
    options += ["--tensorboard-dir", str(folder / "events")]
    with (folder / "output").open("w") as file, redirect_stdout(file):
        ranks = run_ranks(_train, 4, str(path), options, init=False, timeout_s=120)
    if find_spec("tensorboard"):
        ranks[3][0] = _events(folder / "events")
    return ranks, (folder / "output").read_text()


def _mosaic(scalars):
    return {
        name.removeprefix("mosaic/"): values
        for name, values in scalars.items()
        if name.startswith("mosaic/")
    }


def test_telemetry_has_every_number_of_every_module_at_every_log_interval(logged):
    ranks, _ = logged
    scalars = _mosaic(ranks[3][0])

    of_modules = {
        f"{module}/{what}"
        for module in ("vision", "language")
        for what in ("flops", "time", "bubble", "boundary-bytes", "memory-bytes", "mfu")
    }
    of_step = {"step-time", "step-time-predicted", "bubble", "mfu", "tflops-per-gpu"}
    assert of_modules | of_step <= scalars.keys()
    assert all(list(values) == [2, 4, 6] for values in scalars.values())


def test_telemetry_goes_to_both_writers_and_on_one_rank_only(logged):
    ranks, _ = logged

    events, wandb = map(_mosaic, ranks[3][:2])
    assert events.keys() == wandb.keys()
    assert all(events[name] == pytest.approx(wandb[name], rel=1e-6) for name in wandb)
    assert not any(_mosaic(scalars) for rank in ranks[:3] for scalars in rank[:2])


def test_terms_of_a_step_are_as_long_as_the_step(logged):
    ranks, _ = logged
    scalars = _mosaic(ranks[3][0])

    terms = ("compute", "communication", "bubble", "sync", "optimizer", "other")
    for iteration in (4, 6):
        own_s = {term: scalars[f"{term}-time"][iteration] for term in terms}
        assert own_s["other"] == pytest.approx(0.0, abs=1e-6)
        assert min(own_s["compute"], own_s["sync"], own_s["optimizer"]) > 0
        modules_s = [scalars[f"{name}/time"][iteration] for name in ("vision", "language")]
        # The busiest rank runs one of both.
        assert max(modules_s) <= own_s["compute"] <= sum(modules_s) + 1e-6


def test_flops_of_modules_add_up_to_the_throughput(logged):
    ranks, _ = logged
    scalars = _mosaic(ranks[3][0])

    total = sum(scalars[f"{name}/flops"][6] for name in ("vision", "language"))
    assert scalars["tflops-per-gpu"][6] == pytest.approx(total / scalars["step-time"][6] / 4 / 1e12)
    # The plan names a peak of 1 TFLOP/s.
    assert scalars["mfu"][6] == pytest.approx(scalars["tflops-per-gpu"][6])
    assert scalars["vision/mfu"][6] == pytest.approx(
        scalars["vision/flops"][6] / scalars["vision/time"][6] / 2 / 1e12
    )


def test_idle_rank_counts_the_operations_of_modules_that_it_does_not_know(logged):
    ranks, _ = logged

    # Rank 0 has built the language model: its arguments have the length of sequences.
    assert _mosaic(ranks[3][1])["language/flops"][6] == ranks[0][2]["flops"]


def test_boundary_bytes_are_those_that_cross_ranks(logged):
    ranks, _ = logged
    scalars = _mosaic(ranks[3][0])

    # Language has a boundary in, and none out. The rows of vision go both ways: width 32, 4 bytes.
    assert scalars["language/boundary-bytes"][6] == 0
    assert scalars["vision/boundary-bytes"][6] > 0
    assert scalars["vision/boundary-bytes"][6] % (32 * 4) == 0


def test_predictions_are_logged_beside_what_they_predict(logged):
    ranks, _ = logged
    scalars = _mosaic(ranks[3][0])

    assert scalars["step-time-predicted"][6] == pytest.approx(1e-3)
    assert scalars["compute-time-predicted"][6] == pytest.approx(9e-4)
    assert scalars["memory-bytes-predicted"][6] == 1.5e6


def test_step_far_from_its_prediction_is_told_once(logged):
    _, output = logged

    (warning,) = [line for line in output.splitlines() if "warning: mosaic: " in line]
    assert " times the plan's 1 ms; most of that is " in warning
