"""What an emitter is given, what it gives, and how it refuses."""

from dataclasses import dataclass
from shlex import quote

from megatron_mosaic.errors import PlanError
from megatron_mosaic.layout.placement import ModulePlacement
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.layout.ranks import show_ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """How a run is started.

    Args:
        plan_path: Path of the plan file, as the ranks will find it.
        script: Training script.
        gpus_per_node: GPUs of a node.
    """

    plan_path: str
    script: str
    gpus_per_node: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Emission:
    """What a format makes of a plan.

    Args:
        text: The plan in the format, without a final newline.
        notes: What the user has to see to, a line each.
    """

    text: str
    notes: tuple[str, ...] = ()


class InexpressibleError(PlanError):
    """A format has no words for something in the plan.

    Args:
        message: ``<where>: <field>=<value> must <rule>``, without advice.
    """


def shell_lines(*options: tuple[str, ...], head: str = "") -> str:
    """Options as lines of a shell command, each continued by the next."""
    lines = [" ".join(quote(str(word)) for word in option) for option in options]
    return " \\\n  ".join([head, *lines] if head else lines)


def environment_notes(plan: Plan) -> tuple[str, ...]:
    """What Megatron demands of the environment where a module splits its layers.

    Source:
        megatron/training/arguments.py, core_v0.19.0, before architecture 10.
    """
    if all(m.shape.tp * m.shape.cp == 1 for m in plan.modules.values()):
        return ()
    return ("set CUDA_DEVICE_MAX_CONNECTIONS=1 in the environment of GPUs before Blackwell",)


def refuse_outputs(plan: Plan) -> None:
    """Refuses modules that the language model feeds."""
    for name in plan.outputs:
        raise InexpressibleError(
            f"modules.{name}: edge=[language, {name}] must be absent, only encoders are known"
        )


def refuse_attention_and_items(plan: Plan) -> None:
    """Refuses masks and assignments of tokens and items that only this package knows."""
    attention = plan.language.attention
    if attention is not None:
        raise InexpressibleError(
            f"modules.language: attention={attention.mask} must be absent, only causal attention "
            f"with tokens in zigzag order is known"
        )
    for name in plan.encoders:
        if plan.modules[name].items != "in_order":
            raise InexpressibleError(
                f"modules.{name}: items={plan.modules[name].items} must be in_order"
            )


def refuse_uneven_stages(placement: ModulePlacement) -> None:
    """Refuses layers that are not split evenly."""
    split = placement.layers_per_stage
    if split is not None and len(set(split)) > 1:
        raise InexpressibleError(
            f"modules.{placement.name}: layers_per_stage={list(split)} must be an even split"
        )


def refuse_virtual_stages(placement: ModulePlacement) -> None:
    """Refuses several stages of the module on a rank."""
    virtual = placement.virtual_pipeline_model_parallel_size
    if virtual > 1:
        raise InexpressibleError(
            f"modules.{placement.name}: virtual_pipeline_model_parallel_size={virtual} must be 1"
        )


def refuse_other_recompute(plan: Plan) -> None:
    """Refuses encoders with another recomputation than the language model."""
    expected = plan.language.recompute
    for name in plan.encoders:
        if plan.modules[name].recompute != expected:
            raise InexpressibleError(
                f"modules.{name}: recompute={plan.modules[name].recompute} must equal {expected} "
                f"of language"
            )


def check_tiling(plan: Plan) -> None:
    """Checks that modules have ranks one after the other, in order and without gaps.

    Raises:
        InexpressibleError: Ranks are shared, idle or not in ascending order.
    """
    expected = 0
    for placement in sorted(plan.modules.values(), key=lambda placement: min(placement.ranks)):
        span = range(expected, expected + len(placement.ranks))
        if placement.ranks != tuple(span):
            raise InexpressibleError(
                f"modules.{placement.name}: ranks={show_ranks(placement.ranks)} must be "
                f"{show_ranks(span)}, the next ones that no other module has"
            )
        expected = span.stop
    if expected != plan.world_size:
        raise InexpressibleError(
            f"world_size={plan.world_size} must be {expected}, the ranks that host a module"
        )


def check_pipelined(plan: Plan) -> None:
    """Checks that encoders work ahead by whole microbatches, as in 1F1B.

    Raises:
        InexpressibleError: The plan has another schedule.
    """
    if plan.schedule.kind == "no_pipelining":
        raise InexpressibleError("schedule: kind=no_pipelining must be 1f1b")
    check_single_microbatches(plan)


def check_single_microbatches(plan: Plan) -> None:
    """Checks that encoders take the language model's microbatches one by one.

    Raises:
        InexpressibleError: A task of theirs has several.
    """
    if plan.schedule.kind in ("bubble_fill", "concurrent"):
        raise InexpressibleError(f"schedule: kind={plan.schedule.kind} must be colocated")
    group = plan.schedule.encoder_group or plan.num_microbatches
    if plan.schedule.kind == "colocated" and group > 1:
        raise InexpressibleError(f"schedule: encoder_group={group} must be 1")
