"""A plan in place of a former one, whose GPUs are no longer all there."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from megatron_mosaic.cluster.shipped import cluster_of_size, shipped_clusters
from megatron_mosaic.errors import LayoutError, PlanError
from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.layout.ranks import show_ranks
from megatron_mosaic.model.shipped import load_model, shipped_models
from megatron_mosaic.model.spec import ModelSpec
from megatron_mosaic.planner.planner import cluster_digest, model_digest

GIVEN = "given"
"""Key of a plan's inputs: what was on the command line of the planner."""

_SIZES: Mapping[str, str] = {
    "TP": "tensor_model_parallel_size",
    "CP": "context_parallel_size",
    "DP": "data_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "VPP": "virtual_pipeline_model_parallel_size",
    "EP": "expert_model_parallel_size",
}


def given_inputs(*, model: str, cluster: str, pins: Sequence[str]) -> dict[str, Any]:
    """What a plan notes of the command that made it, so that it can be made again."""
    return {"model": model, "cluster": cluster, **({"set": list(pins)} if pins else {})}


def former_model(plan: Plan, *, where: str) -> str:
    """Finds the model that a plan was made for: what was given then, or a shipped one.

    Args:
        plan: The former plan.
        where: Name of its file in messages.

    Raises:
        PlanError: No model with the digest that the plan notes is known.
    """
    return _former(
        "model", plan, shipped_models(), lambda name: model_digest(load_model(name)), where=where
    )


def former_cluster(plan: Plan, *, where: str) -> str:
    """Finds the cluster that a plan was made for, as :func:`former_model` does.

    Raises:
        PlanError: No cluster with the digest that the plan notes is known.
    """

    def digest(name: str) -> str:
        return cluster_digest(cluster_of_size(name, num_gpus=plan.world_size))

    return _former("cluster", plan, shipped_clusters(), digest, where=where)


def _former(
    field: str, plan: Plan, shipped: Sequence[str], digest: Callable[[str], str], *, where: str
) -> str:
    inputs = plan.inputs or {}
    given = inputs.get(GIVEN, {}).get(field)
    for name in (*([given] if given is not None else []), *shipped):
        try:
            if digest(name) == inputs.get(field):
                return name
        except (PlanError, LayoutError):
            continue  # a file that is gone, or a cluster that never had so many GPUs
    noted = str(inputs.get(field, "nothing"))[: len("sha256:") + 12]
    named = f", and {given} no longer is" if given is not None else ""
    raise PlanError(
        f"{where}: inputs.{field}={noted} must be the digest of a shipped {field} or of the file "
        f"that the plan was made from{named}; give the {field} again: megatron-mosaic plan MODEL "
        f"CLUSTER --from {where}"
    )


def changes(
    former: Plan, plan: Plan, *, model: ModelSpec, pins: Sequence[str] = ()
) -> tuple[str, ...]:
    """Says in sentences what a plan changes of the one that it replaces.

    Args:
        former: The plan that is replaced.
        plan: The new one.
        model: What the new one was made for.
        pins: Fields that are fixed.
    """
    return tuple(_changes(former, plan, model, pins))


def _changes(former: Plan, plan: Plan, model: ModelSpec, pins: Sequence[str]) -> Iterator[str]:
    yield f"{former.world_size} GPUs become {plan.world_size}{_idle(plan)}."
    if plan.global_batch_size == former.global_batch_size:
        yield f"A step has {plan.global_batch_size} samples as before."
    else:
        yield (
            f"A step has {plan.global_batch_size} samples, not {former.global_batch_size}: the "
            f"run goes on with another batch size, which the learning rate should know."
        )
    before, after = _microbatch(former), _microbatch(plan)
    if before != after:
        yield (
            f"A microbatch of all replicas has {after} samples, not {before}: losses stay the "
            f"same with --calculate-per-token-loss; without it, where samples have unlike numbers "
            f"of tokens, means are over other microbatches."
        )
    for name, placement in plan.modules.items():
        old, new = _sizes(former.modules.get(name)), _sizes(placement)
        if old != new:
            yield f"{name}: {old} becomes {new}."
    if plan.schedule.kind != former.schedule.kind:
        yield f"The schedule is {plan.schedule.kind}, not {former.schedule.kind}."
    yield from _other_inputs(former, model, pins)


def _other_inputs(former: Plan, model: ModelSpec, pins: Sequence[str]) -> Iterator[str]:
    inputs = former.inputs or {}
    if inputs.get("model") not in (None, model_digest(model)):
        yield f"The model {model.name} is not the one that the former plan was made for."
    freed = [pin for pin in inputs.get(GIVEN, {}).get("set", ()) if pin not in pins]
    if freed:
        yield f"No longer fixed: {', '.join(freed)}; --set fixes them again."


def _idle(plan: Plan) -> str:
    hosts = {rank for placement in plan.modules.values() for rank in placement.ranks}
    idle = [rank for rank in range(plan.world_size) if rank not in hosts]
    return f", of which {show_ranks(idle)} stay idle" if idle else ""


def _microbatch(plan: Plan) -> int:
    return plan.micro_batch_size * plan.language.data_parallel_size


def _sizes(placement: ModulePlacement | None) -> str:
    if placement is None:
        return "nothing"
    sizes = {short: getattr(placement, name) for short, name in _SIZES.items()}
    shown = " ".join(f"{short}{size}" for short, size in sizes.items() if size > 1) or "one replica"
    return f"{shown} on ranks {show_ranks(placement.ranks)}"
