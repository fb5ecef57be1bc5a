"""Times of modules that run at the same time on the ranks they share."""

from collections.abc import Callable, Mapping
from functools import cache, partial

from megatron_mosaic.cluster.spec import Gpu
from megatron_mosaic.cost.costs import StageCosts
from megatron_mosaic.cost.efficiency import find_curve
from megatron_mosaic.cost.plan_times import StageInPlan
from megatron_mosaic.cost.spatial import Demand, sharing_of, slowdowns, sms_beside
from megatron_mosaic.errors import PlanError
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.schedule.graph import Stage
from megatron_mosaic.schedule.simulate import LaneTimes, Pass, PassTimes

PassSeconds = Callable[[Pass, int, float], float]
"""Seconds of a pass with some multiprocessors, and a part of the bandwidth these would have."""


def lane_times(
    plan: Plan, stages: Mapping[Stage, StageInPlan], *, gpu: Gpu, pass_s: PassSeconds
) -> LaneTimes:
    """Says how long passes take with their quotas, and how much longer beside others.

    A pass asks for as much of the bandwidth as it moves in its time, and for the host while it is
    launched. Its time grows with that of a byte as it does when the bandwidth halves.

    Args:
        plan: Modules with and without quotas.
        stages: Its stages, as they are on the whole GPU.
        gpu: The whole one.
        pass_s: Time of a pass.

    Raises:
        PlanError: A quota is more than the GPU, or nothing is known about sharing it.
    """
    interference = sharing_of(gpu).interference
    quotas = read_quotas(plan, gpu)
    wanted = {name: gpu.num_sms if sms is None else sms for name, sms in quotas.items()}
    most = gpu.memory_bytes_per_s * find_curve(gpu, "elementwise", "bf16").peak_share

    @cache
    def demand(work: Pass) -> Demand:
        own_s = partial(pass_s, work, wanted[work.stage.module])
        return _demand(work, stages[work.stage].costs, own_s, most_bytes_per_s=most)

    def stretch(work: Pass, sms: int) -> float:
        full = wanted[work.stage.module]
        return pass_s(work, sms, 1.0) / pass_s(work, full, 1.0) if sms < full else 1.0

    @cache
    def slowdown(passes: tuple[Pass, ...]) -> tuple[float, ...]:
        given = sms_beside([quotas[it.stage.module] for it in passes], num_sms=gpu.num_sms)
        stretches = [stretch(it, sms) for it, sms in zip(passes, given, strict=True)]
        return slowdowns([demand(it) for it in passes], stretches, interference=interference)

    shared_s = {}
    for stage in stages:
        sms = wanted[stage.module]
        passes_s = (pass_s(Pass(stage, back), sms, 1.0) for back in (False, True))
        shared_s[stage] = PassTimes(*passes_s)
    return LaneTimes(shared_s, slowdown)


def _demand(
    work: Pass, costs: StageCosts, own_s: Callable[[float], float], *, most_bytes_per_s: float
) -> Demand:
    """What a pass asks for, by its times with all and with half of its bandwidth."""
    alone_s = own_s(1.0)
    if not alone_s:
        return Demand(0.0, 0.0)
    moved_bytes, host_s = costs.forward_bytes, costs.forward_host_s
    if work.backward:
        moved_bytes, host_s = costs.backward_bytes, costs.backward_host_s
    return Demand(
        bandwidth=min(1.0, moved_bytes / (alone_s * most_bytes_per_s)),
        stall=min(1.0, own_s(0.5) / alone_s - 1),
        host=min(1.0, host_s / alone_s),
    )


def read_quotas(plan: Plan, gpu: Gpu) -> dict[str, int | None]:
    """Multiprocessors that each module of a plan may use while others are at work; None is all.

    Raises:
        PlanError: A module is to have more than the GPU.
    """
    quotas = {name: it.share.sms if it.share else None for name, it in plan.modules.items()}
    for name, sms in quotas.items():
        if sms is not None and sms > gpu.num_sms:
            raise PlanError(
                f"modules.{name}: share.sms={sms} must be <= {gpu.num_sms}, the multiprocessors "
                f"of gpu {gpu.name}; lower it, or remove share for the whole GPU"
            )
    return quotas
