"""Lanes of a real GPU: the SMs that kernels ran on, what runs at once, and right gradients."""

import itertools

import pytest
import torch

from megatron_mosaic.cluster.sm_partition import partitions
from megatron_mosaic.errors import LayoutError
from megatron_mosaic.sharing.choose import open_lanes
from megatron_mosaic.sharing.guards import Environment
from megatron_mosaic.sharing.lane import Quota

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False"
    ),
    # torch warns that green contexts may change.
    pytest.mark.filterwarnings("default"),
]

GPU = torch.device("cuda", 0)
BLOCKS_PER_SM = 8  # enough that every SM of a lane has one
SHORT_S, LONG_S = 2e-4, 5e-3
FP32_BOUND = 1e-5  # products may be summed in another order on fewer SMs


def spin(blocks):
    from benchmarks.sharing.kernels import Spin  # Triton is there only with a GPU

    return Spin(blocks, GPU)


def on_every_sm():
    return spin(BLOCKS_PER_SM * num_sms())


def num_sms():
    return torch.cuda.get_device_properties(GPU).multi_processor_count


def splits(num_lanes):
    capability = torch.cuda.get_device_capability(GPU)
    return list(partitions(num_sms(), compute_capability=capability, num_lanes=num_lanes))


def lanes_of(*sms, mode="strict"):
    quotas = [Quota(lane=f"lane{lane}", sms=each) for lane, each in enumerate(sms)]
    return open_lanes(quotas, mode=mode, device=GPU, environment=Environment())


def sms_of(lanes, *, at_once, whole=False):
    """SMs on which kernels of each lane ran, all lanes at work at once or one after the other."""
    spins = {name: on_every_sm() for name in lanes.named}
    torch.cuda.synchronize()
    for name, lane in lanes.named.items():
        with lane.active(whole=whole):
            spins[name].launch(SHORT_S)
        if not at_once:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    return [set(each.sms()) for each in spins.values()]


def check_disjoint(split):
    lanes = lanes_of(*split)
    own = sms_of(lanes, at_once=True)

    assert tuple(lane.sms for lane in lanes.named.values()) == split
    assert tuple(map(len, own)) == split
    assert not any(one & other for one, other in itertools.combinations(own, 2))


def test_every_split_of_two_lanes_has_its_sms_to_itself():
    for split in splits(2):
        check_disjoint(split)


def test_some_splits_of_three_and_four_lanes_have_their_sms_to_themselves():
    threes, fours = splits(3), splits(4)

    for split in (threes[0], threes[len(threes) // 2], fours[0], fours[len(fours) // 2]):
        check_disjoint(split)


def test_lane_that_is_alone_has_the_whole_gpu():
    quota = splits(2)[3][0]

    capped, uncapped = sms_of(lanes_of(quota, None), at_once=False, whole=True)

    assert len(capped) == len(uncapped) == num_sms()


def test_lane_without_quota_uses_the_sms_of_others_too():
    quota = splits(2)[3][0]

    capped, uncapped = sms_of(lanes_of(quota, None), at_once=False)

    assert len(capped) == quota
    assert capped <= uncapped
    assert len(uncapped) == num_sms()


def test_two_green_contexts_of_two_splits_share_sms():
    contexts = getattr(torch.cuda, "GreenContext", None)
    if contexts is None or not hasattr(contexts, "Stream"):
        pytest.skip("torch has no streams of green contexts: they come with 2.11")
    half = splits(2)[len(splits(2)) // 2][0]
    sms = []
    for context in [contexts.create(num_sms=half, device_id=0) for _ in range(2)]:
        probe = on_every_sm()
        torch.cuda.synchronize()
        with context.Stream():
            probe.launch(SHORT_S)
        torch.cuda.synchronize()
        sms.append(set(probe.sms()))

    assert sms[0] & sms[1]


@pytest.mark.parametrize("mode", ["strict", "priority", "streams"])
def test_lanes_run_at_once(mode):
    lanes = lanes_of(*splits(2)[0], mode=mode)
    spins = [spin(1), spin(1)]
    torch.cuda.synchronize()

    for lane, probe in zip(lanes.named.values(), spins, strict=True):
        with lane.active():
            probe.launch(LONG_S)
    torch.cuda.synchronize()

    (began, ended), (other_began, other_ended) = (probe.span_ns() for probe in spins)
    assert began < other_ended
    assert other_began < ended


def test_quota_that_the_device_lacks_is_refused():
    with pytest.raises(LayoutError, match=r"cuda:0: share\.sms=1 must be a group of"):
        lanes_of(1, None)


def test_lane_runs_in_order_while_it_goes_over_to_the_whole_gpu():
    lane = lanes_of(splits(2)[0][0], None).named["lane0"]
    value, slow = torch.ones(1 << 20, device=GPU), spin(1)
    torch.cuda.synchronize()

    for step in range(10):
        with lane.active(whole=step % 2 == 0):
            slow.launch(SHORT_S)  # what comes too early reads what is not there yet
            value = value * 2 + 1
    torch.cuda.synchronize()

    assert torch.equal(value, torch.full_like(value, 2.0**11 - 1))


class Probe(torch.autograd.Function):
    """Notes on which SMs its two passes run."""

    @staticmethod
    def forward(ctx, values, spins):
        ctx.spins = spins
        spins[0].launch(SHORT_S)
        return values.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.spins[1].launch(SHORT_S)
        return grad.clone(), None


@pytest.mark.parametrize("forward_whole", [False, True])
def test_backward_pass_runs_on_the_sms_of_its_forward_pass(forward_whole):
    quota = splits(2)[3][0]
    lane = lanes_of(quota, None).named["lane0"]
    spins, values = (on_every_sm(), on_every_sm()), torch.ones(4, device=GPU, requires_grad=True)
    torch.cuda.synchronize()

    with lane.active(whole=forward_whole):
        result = Probe.apply(values, spins)
    with lane.active(whole=not forward_whole):
        result.backward(torch.ones(4, device=GPU))
    torch.cuda.synchronize()

    expected = num_sms() if forward_whole else quota
    assert [len(each.sms()) for each in spins] == [expected, expected]


class Model(torch.nn.Module):
    def __init__(self, width, *, layers):
        super().__init__()
        blocks = [[torch.nn.Linear(width, width), torch.nn.GELU()] for _ in range(layers)]
        self.layers = torch.nn.Sequential(*itertools.chain.from_iterable(blocks))

    def forward(self, values):
        return self.layers(values)


def gradients(lanes, *, num_microbatches=6, width=512):
    """Gradients of an encoder and what it feeds, launched microbatch by microbatch in two lanes.

    The encoder is one microbatch ahead; rows and their gradients cross lanes by events.
    """
    torch.manual_seed(0)
    encoder, language = lanes.named.values()
    begin = lanes.main.record()
    models = []
    for lane, layers in ((encoder, 3), (language, 6)):
        lane.wait(begin)
        with lane.active():
            models.append(Model(width, layers=layers).to(GPU))
    samples = [torch.randn(256, width, device=GPU) for _ in range(num_microbatches)]
    sent = lanes.main.record()
    encoder.wait(sent)
    rows, leaves, losses = {}, {}, []
    for step in range(num_microbatches + 1):
        if step < num_microbatches:
            with encoder.active():
                rows[step] = models[0](samples[step]), encoder.record()
        if step:
            made, event = rows[step - 1]
            language.wait(event)
            with language.active():
                leaves[step - 1] = leaf = made.detach().requires_grad_()
                language.hold(made)
                loss = models[1](leaf).square().mean()
                loss.backward()
                losses.append(loss.detach())
                event = language.record()
            encoder.wait(event)
            with encoder.active():
                encoder.hold(leaf.grad)
                made.backward(leaf.grad)
    for lane in lanes.named.values():
        lanes.main.wait(lane.record())
    return [loss.clone() for loss in losses] + [
        weight.grad.clone() for model in models for weight in model.parameters()
    ]


@pytest.mark.parametrize("mode", ["strict", "priority", "streams"])
@pytest.mark.parametrize("uncapped", [False, True])
def test_gradients_in_lanes_are_those_of_one_after_the_other(mode, uncapped):
    encoder, language = splits(2)[3]
    reference = gradients(lanes_of(encoder, language, mode="serial"))

    found = gradients(lanes_of(encoder, None if uncapped else language, mode=mode))

    for tensor, expected in zip(found, reference, strict=True):
        assert (tensor - expected).norm() <= FP32_BOUND * expected.norm()
