"""Whether the choice of a plan holds where the least certain constants are wrong."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron_mosaic.cluster.spec import Cluster
from megatron_mosaic.cost.cost_model import CostModel
from megatron_mosaic.cost.costs import ModuleCosts, PartCosts, PartRun
from megatron_mosaic.cost.sizes import ParallelSizes
from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.model.spec import ModelSpec
from megatron_mosaic.model.tokens import Distribution
from megatron_mosaic.planner.estimate import Estimate, Estimator
from megatron_mosaic.planner.problem import Pins, Problem

CHANGE = 0.2
"""How far each constant is moved, either way: about the largest error of the cost model's rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Plans estimated anew with one constant moved.

    Args:
        constant: Which.
        factor: By what it was multiplied.
        steps_s: Step times of the plans in closed form, the choice first.
        fastest: Place of the fastest among them.
        fits: Whether the choice still fits the memory.
    """

    constant: str
    factor: float
    steps_s: tuple[float, ...]
    fastest: int
    fits: bool

    @property
    def loss(self) -> float:
        """Share by which the choice is slower than the fastest plan."""
        return self.steps_s[0] / self.steps_s[self.fastest] - 1


def sensitivity(problem: Problem, estimates: Sequence[Estimate]) -> tuple[Case, ...]:
    """Estimates plans with each of the least certain constants moved up and down.

    Args:
        problem: What they were planned for.
        estimates: The choice first, then what it is compared with.
    """
    return tuple(
        _case(problem, estimates, constant, factor, change)
        for constant, change in _CHANGES
        for factor in (1 - CHANGE, 1 + CHANGE)
    )


Change = Callable[[Problem, float], tuple[Problem, CostModel]]


def _case(
    problem: Problem, estimates: Sequence[Estimate], constant: str, factor: float, change: Change
) -> Case:
    changed, cost_model = change(problem, factor)
    boundless = replace(changed, reserved_bytes=float("-inf"))
    steps_s, fits = [], True
    for number, estimate in enumerate(estimates):
        # Layers stay where the plan has them: other numbers would have split them otherwise.
        split = {name: {"layers_per_stage": n} for name, n in estimate.layers_per_stage.items()}
        pinned = replace(boundless, pins=Pins(modules=split))
        again = Estimator(pinned, cost_model).estimate(estimate.candidate)
        assert again is not None  # memory has no limit
        steps_s.append(again.step_s)
        if number == 0:
            fits = again.peak_bytes <= problem.memory_bytes
    fastest = min(range(len(steps_s)), key=steps_s.__getitem__)
    return Case(
        constant=constant, factor=factor, steps_s=tuple(steps_s), fastest=fastest, fits=fits
    )


def _links(problem: Problem, factor: float) -> tuple[Problem, CostModel]:
    cluster = problem.cluster
    tiers = tuple(
        replace(tier, bandwidth_bytes_per_s=tier.bandwidth_bytes_per_s * factor)
        for tier in cluster.tiers
    )
    return _with_cluster(problem, replace(cluster, tiers=tiers))


def _matmul(problem: Problem, factor: float) -> tuple[Problem, CostModel]:
    gpu = problem.cluster.gpu
    curves = {
        name: replace(curve, peak_share=min(1.0, curve.peak_share * factor))
        if "matmul" in name or "attention" in name
        else curve
        for name, curve in gpu.curves.items()
    }
    return _with_cluster(problem, replace(problem.cluster, gpu=replace(gpu, curves=curves)))


def _with_cluster(problem: Problem, cluster: Cluster) -> tuple[Problem, CostModel]:
    return replace(problem, cluster=cluster), CostModel(problem.model, cluster, problem.settings)


def _backward(problem: Problem, factor: float) -> tuple[Problem, CostModel]:
    return problem, _SlowerBackward(problem, factor)


def _tokens(problem: Problem, factor: float) -> tuple[Problem, CostModel]:
    model = with_encoder_tokens(problem.model, factor)
    return replace(problem, model=model), CostModel(model, problem.cluster, problem.settings)


def with_encoder_tokens(model: ModelSpec, factor: float) -> ModelSpec:
    """A model whose samples have more, or fewer, items for the encoders; its sequence stays."""
    modules = {
        name: module
        if name == LANGUAGE
        else replace(
            module,
            items_per_sample=Distribution(
                tuple(value * factor for value in module.items_per_sample.values),
                module.items_per_sample.shares,
            ),
        )
        for name, module in model.modules.items()
    }
    return replace(model, modules=modules)


_CHANGES: tuple[tuple[str, Change], ...] = (
    ("link bandwidth", _links),
    ("matmul efficiency", _matmul),
    ("backward/forward ratio", _backward),
    ("encoder tokens per sample", _tokens),
)


class _SlowerBackward(CostModel):
    """Costs with another ratio of backward to forward time."""

    def __init__(self, problem: Problem, factor: float) -> None:
        super().__init__(problem.model, problem.cluster, problem.settings)
        self.factor = factor

    def count_parts(self, name: str, sizes: ParallelSizes, samples: float) -> ModuleCosts:
        costs = super().count_parts(name, sizes, samples)
        return replace(
            costs,
            input=self._slower(costs.input),
            layers=tuple(PartRun(run.count, self._slower(run.costs)) for run in costs.layers),
            output=self._slower(costs.output),
        )

    def _slower(self, part: PartCosts) -> PartCosts:
        return replace(
            part,
            input_gradient_s=part.input_gradient_s * self.factor,
            weight_gradient_s=part.weight_gradient_s * self.factor,
        )
