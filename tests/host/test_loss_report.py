import pytest
import torch
import torch.distributed as dist

from tests.host_reads import host_reads
from tests.ranks import run_ranks


def _reduce(rank, steps):
    """Reduces the losses of some steps; returns the last report, or the error of the first."""
    from megatron_mosaic.errors import HostError
    from megatron_mosaic.host.loss_report import LossReport

    report = LossReport(dist.group.WORLD)
    losses = []
    for step in steps:
        of_module = {
            name: [{key: torch.tensor(value) for key, value in entry.items()} for entry in entries]
            for name, entries in step[rank].items()
        }
        try:
            losses, _ = report.reduce(of_module, num_tokens=1, replicas=1, forward_only=False)
            report.check()
        except HostError as error:
            return str(error)
    return {key: value.tolist() for entry in losses for key, value in entry.items()}


def test_losses_of_all_ranks_are_reported_on_every_rank():
    step = [
        {"language": [{"lm loss": [3.0, 2.0]}, {"lm loss": [5.0, 4.0]}]},
        {"image": [{"mse": [1.0]}, {"mse": [2.0]}]},
    ]

    # Sums of loss and tokens, 3 + 5 and 2 + 4; and the mean (1 + 2) / 2.
    assert run_ranks(_reduce, 2, [step]) == [{"lm loss": [8.0, 6.0], "mse": [1.5]}] * 2


@pytest.mark.parametrize("together", [True, False])
def test_two_modules_may_not_report_a_loss_of_one_name(together):
    language, image = {"language": [{"loss": [1.0]}]}, {"image": [{"loss": [2.0]}]}
    step = [language | image, {}] if together else [language, image]

    for message in run_ranks(_reduce, 2, [step]):
        assert "loss function: reported=loss of image must have another name" in message
        assert "than that of language; report each module's loss under its own name" in message


@pytest.mark.parametrize(
    "changed",
    [
        [{"loss": [1.0, 1.0]}, {"loss": [1.0]}],
        [{"loss": [1.0, 1.0]}, {}],
        [{"loss": [1.0, 1.0]}, {"loss": [1.0, 1.0], "more": [1.0]}],
    ],
)
def test_loss_function_that_reports_unlike_microbatches_stops_all_ranks(changed):
    before = [{"language": [{"loss": [1.0, 1.0]}]}, {}]

    one, other = run_ranks(_reduce, 2, [before, [{"language": changed}, {}]])

    assert "must be what it reported in the first step, ['loss']" in one
    assert other == "run: rank 0 stopped"


def _reads_of_the_second_step(rank):
    from megatron_mosaic.host.loss_report import LossReport

    report = LossReport(dist.group.WORLD)
    losses = {"language": [{"lm loss": torch.tensor([3.0, 2.0])}]}
    options = {"num_tokens": 2, "replicas": 2, "forward_only": False}
    report.reduce(losses, **options)
    with host_reads() as found:
        report.reduce(losses, **options)
    return found


def test_losses_are_reduced_without_waiting_for_the_device():
    # Gradients are reduced next: what reads the losses on the host would hold that back.
    assert run_ranks(_reads_of_the_second_step, 2) == [[], []]
