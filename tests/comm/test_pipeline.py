import pytest
import torch

from megatron_mosaic.comm.groups import GroupFactory
from megatron_mosaic.comm.pipeline import PipelineLink
from megatron_mosaic.comm.record import record
from megatron_mosaic.comm.replay import Issue, ReplayError, replay
from tests.ranks import run_ranks

CPU = torch.device("cpu")
NUM_STAGES, NUM_MICROBATCHES, SHAPE = 3, 3, (4, 2)


@pytest.fixture(scope="module")
def outcomes():
    return run_ranks(_run_stage, NUM_STAGES)


def test_pipeline_gives_the_unsharded_outputs_and_gradients(outcomes):
    for microbatch in range(NUM_MICROBATCHES):
        inputs = _inputs(microbatch).requires_grad_()
        outputs = inputs
        for stage in range(NUM_STAGES):
            outputs = _stage(outputs, stage)
        outputs.square().sum().backward()

        torch.testing.assert_close(outcomes[2]["outputs"][microbatch], outputs.detach())
        torch.testing.assert_close(outcomes[0]["gradients"][microbatch], inputs.grad)


def test_pipeline_order_cannot_hang(outcomes):
    replay({rank: outcome["record"] for rank, outcome in enumerate(outcomes)})


def test_pipeline_order_with_one_pair_swapped_would_hang(outcomes):
    records = {rank: list(outcome["record"]) for rank, outcome in enumerate(outcomes)}
    middle = records[1]
    # The middle stage's first receive and its first send: now it waits for what it never asked.
    first, second = [i for i, entry in enumerate(middle) if isinstance(entry, Issue)][:2]
    middle[first], middle[second] = middle[second], middle[first]

    with pytest.raises(ReplayError, match=r"(?s)would hang:\nrank .*rank 1 waits for \[recv 0"):
        replay(records)


def test_link_over_gloo_carries_host_memory_and_delivers_on_its_device():
    # A tensor on "meta" has no memory: gloo could not have received into it.
    assert run_ranks(_receive_on_meta, 2) == ["cpu", "meta"]


def test_link_inside_a_rank_hands_over_without_a_message():
    ((same_memory, requires_grad, num_operations),) = run_ranks(_hand_over, 1)

    assert (same_memory, requires_grad, num_operations) == (True, False, 0)


def _hand_over(rank):
    link = PipelineLink(
        group=GroupFactory(rank).group((0,), scope="link"),
        source=0,
        destination=0,
        dtype=torch.float32,
        device=CPU,
    )
    leaving = _inputs(0).requires_grad_()
    with record() as log:
        arrived = link.post(leaving, shape=SHAPE).wait()
    return arrived.data_ptr() == leaving.data_ptr(), arrived.requires_grad, len(log)


def _receive_on_meta(rank):
    link = PipelineLink(
        group=GroupFactory(rank).group((0, 1), scope="link"),
        source=0,
        destination=1,
        dtype=torch.float32,
        device=CPU if rank == 0 else torch.device("meta"),
    )
    return str(link.post(_inputs(0) if rank == 0 else None, shape=SHAPE).wait().device)


def _inputs(microbatch):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(microbatch))


def _stage(inputs, stage):
    return torch.tanh(inputs * (stage + 1.5))


def _run_stage(rank):
    pairs = [(stage, stage + 1) for stage in range(NUM_STAGES - 1)]
    names = [(kind, pair) for pair in pairs for kind in ("forward", "gradient")]
    factory = GroupFactory(rank)
    groups = {f"{kind}{pair}": factory.group(pair, scope=kind) for kind, pair in names}

    def link(kind, low):
        if not 0 <= low < NUM_STAGES - 1:
            return None
        pair = (low, low + 1)
        source, destination = pair if kind == "forward" else pair[::-1]
        return PipelineLink(
            group=groups[f"{kind}{pair}"],
            source=source,
            destination=destination,
            dtype=torch.float32,
            device=CPU,
        )

    with record() as entries:
        outputs, gradients = _walk(
            rank,
            forward=(link("forward", rank - 1), link("forward", rank)),
            gradient=(link("gradient", rank), link("gradient", rank - 1)),
        )
    return {"outputs": outputs, "gradients": gradients, "record": entries}


def _walk(rank, *, forward, gradient):
    """All forward passes, then all backward passes."""
    inputs, outputs, gradients, sent = [], [], [], []
    for microbatch in range(NUM_MICROBATCHES):
        previous = _inputs(microbatch)
        if forward[0]:
            previous = forward[0].post(None, shape=SHAPE).wait()
        inputs.append(previous.requires_grad_())
        outputs.append(_stage(inputs[-1], rank))
        if forward[1]:
            sent.append(forward[1].post(outputs[-1], shape=SHAPE))
    for microbatch in range(NUM_MICROBATCHES):
        if gradient[0]:
            outputs[microbatch].backward(gradient[0].post(None, shape=SHAPE).wait())
        else:
            outputs[microbatch].square().sum().backward()
        gradients.append(inputs[microbatch].grad)
        if gradient[1]:
            sent.append(gradient[1].post(gradients[-1], shape=SHAPE))
    for pending in sent:
        pending.finish()
    return [output.detach() for output in outputs], gradients
