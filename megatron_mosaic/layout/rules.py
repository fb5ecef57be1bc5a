"""What must hold between the parts of a plan; each module alone is checked by its placement."""

from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING

from megatron_mosaic.errors import LayoutError
from megatron_mosaic.fields import nearest, show
from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.layout.ranks import MAX_WORLD_SIZE, show_ranks

if TYPE_CHECKING:
    from megatron_mosaic.layout.plan import Plan


def check_plan(plan: "Plan") -> None:
    """Checks a plan's parts against each other; the first contradiction wins.

    Raises:
        LayoutError: Modules, ranks, batch sizes, edges and schedule contradict each other.
    """
    _check_modules(plan)
    _check_experts(plan)
    _check_batch(plan)
    _check_edges(plan)
    _check_connected(plan)
    _check_acyclic(plan)
    _check_schedule(plan)
    _check_virtual_stages(plan)
    _check_ahead(plan)
    _check_encoder_group(plan)
    _check_outputs(plan)
    _check_shares(plan)


def _check_modules(plan: "Plan") -> None:
    if "language" not in plan.modules:
        raise LayoutError(
            f"modules: names={list(plan.modules)} must contain language; "
            f"name the module that computes the loss language"
        )
    if not 1 <= plan.world_size <= MAX_WORLD_SIZE:
        raise LayoutError(
            f"world_size={plan.world_size} must be >= 1 and <= {MAX_WORLD_SIZE}; "
            f"give the number of ranks"
        )
    for name, placement in plan.modules.items():
        outside = [rank for rank in placement.ranks if rank >= plan.world_size]
        if outside:
            raise LayoutError(
                f"modules.{name}: ranks={show_ranks(placement.ranks)} must be < "
                f"world_size={plan.world_size}; remove {show_ranks(outside)} or raise world_size"
            )
    if all(placement.trainable == () for placement in plan.modules.values()):
        raise LayoutError(
            "modules: trainable=[] must not hold for every module; "
            "name a trainable part, or remove the key from the module to train"
        )


def _check_experts(plan: "Plan") -> None:
    for name in plan.encoders:
        placement = plan.modules[name]
        for field, value, dense in (
            ("expert_model_parallel_size", placement.expert_model_parallel_size, 1),
            ("expert_tensor_parallel_size", placement.expert_tensor_parallel_size, None),
        ):
            if value != dense:
                raise LayoutError(
                    f"modules.{name}: {field}={value} must not stand in a module without "
                    f"experts, only in language; remove the key"
                )


def _check_batch(plan: "Plan") -> None:
    for field in ("global_batch_size", "micro_batch_size"):
        if getattr(plan, field) < 1:
            raise LayoutError(f"{field}={getattr(plan, field)} must be >= 1; give samples")
    replicas = plan.language.data_parallel_size
    samples = plan.micro_batch_size * replicas
    if plan.global_batch_size % samples:
        lower = plan.global_batch_size // samples * samples
        raise LayoutError(
            f"global_batch_size={plan.global_batch_size} must be a multiple of micro_batch_size * "
            f"data_parallel_size of language={plan.micro_batch_size}*{replicas}={samples}; "
            f"use {f'{lower} or ' if lower else ''}{lower + samples}, or change a factor"
        )


def _check_edges(plan: "Plan") -> None:
    seen: set[tuple[str, str]] = set()
    for edge in plan.edges:
        source, destination = edge
        shown = f"edges: edge={show(list(edge))}"
        for name in edge:
            if name not in plan.modules:
                advice = nearest(name, plan.modules, otherwise="add the module or remove the edge")
                raise LayoutError(
                    f"{shown} must join two of the modules {list(plan.modules)}; {advice}"
                )
        if source == destination:
            raise LayoutError(f"{shown} must join two different modules; remove the edge")
        if edge in seen:
            raise LayoutError(f"{shown} must be listed once, not twice; remove the second one")
        seen.add(edge)


def _check_connected(plan: "Plan") -> None:
    reached = {"language"}
    # Every round adds the neighbours of the modules reached; no more rounds than modules.
    for _ in plan.modules:
        reached |= {name for edge in plan.edges if reached & set(edge) for name in edge}
    for name in plan.modules:
        if name not in reached:
            raise LayoutError(
                f"modules.{name}: edges={[list(edge) for edge in plan.edges]} must connect "
                f"{name} with language; add [{name}, language] to edges or remove the module"
            )


def _check_acyclic(plan: "Plan") -> None:
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for source, destination in plan.edges:
        sorter.add(destination, source)
    try:
        sorter.prepare()
    except CycleError as error:
        cycle = " -> ".join(error.args[1])
        raise LayoutError(
            f"edges: cycle={cycle} must not exist, data flows one way; remove one of its edges"
        ) from None


def _check_schedule(plan: "Plan") -> None:
    kind = plan.schedule.kind
    if kind in ("colocated", "bubble_fill", "concurrent") and not plan.encoders:
        raise LayoutError(
            f"schedule: kind={kind} must have a module beside language to run; use 1f1b"
        )
    for name, placement in plan.modules.items():
        stages = placement.pipeline_model_parallel_size
        if kind == "no_pipelining" and stages > 1:
            raise LayoutError(
                f"schedule: kind=no_pipelining must meet pipeline_model_parallel_size=1, not "
                f"{stages} of modules.{name}; use 1f1b or colocated"
            )
        shared = sorted(set(placement.ranks) & set(plan.language.ranks))
        if kind in ("1f1b", "interleaved") and name != LANGUAGE and shared:
            raise LayoutError(
                f"schedule: kind={kind} must not share ranks {show_ranks(shared)} between "
                f"modules.{name} and modules.language; use colocated or other ranks"
            )


def _check_virtual_stages(plan: "Plan") -> None:
    kind = plan.schedule.kind
    pp = plan.language.pipeline_model_parallel_size
    virtual = plan.language.virtual_pipeline_model_parallel_size
    where = f"modules.language: virtual_pipeline_model_parallel_size={virtual}"
    if kind == "interleaved" and (virtual == 1 or pp == 1):
        raise LayoutError(
            f"{where} must be > 1 on a pipeline of > 1 ranks, not {pp}, with kind=interleaved; "
            f"raise both or use 1f1b"
        )
    if virtual > 1 and kind not in ("interleaved", "bubble_fill", "concurrent"):
        raise LayoutError(f"{where} must be 1 with kind={kind}; use interleaved or remove the key")
    if virtual > 1 and plan.num_microbatches % pp:
        raise LayoutError(
            f"{where} must go with microbatches that are a multiple of "
            f"pipeline_model_parallel_size={pp}, not {plan.num_microbatches}; "
            f"change global_batch_size or micro_batch_size"
        )


def _check_ahead(plan: "Plan") -> None:
    fed = {destination for _, destination in plan.edges}
    first = [plan.modules[name] for name in plan.encoders if name not in fed]
    if plan.schedule.ahead and all(placement.trainable != () for placement in first):
        raise LayoutError(
            "schedule: ahead=true must find an encoder with trainable=[] that no other module "
            "feeds; remove the key"
        )


def _check_encoder_group(plan: "Plan") -> None:
    group, total = plan.schedule.encoder_group, plan.num_microbatches
    if group is not None and total % group:
        lower = next(n for n in range(min(group, total), 0, -1) if total % n == 0)
        default = "the whole batch" if plan.schedule.kind == "colocated" else "one microbatch"
        raise LayoutError(
            f"schedule: encoder_group={group} must divide the {total} microbatches of a step; "
            f"use {lower}, or remove the key for {default}"
        )


def _check_outputs(plan: "Plan") -> None:
    replicas = plan.language.data_parallel_size
    for name in plan.outputs:
        own = plan.modules[name].data_parallel_size
        if own != replicas:
            raise LayoutError(
                f"modules.{name}: data_parallel_size={own} must equal data_parallel_size of "
                f"language={replicas}, whose microbatches it takes; change one of them"
            )
        if plan.modules[name].items != "in_order":
            raise LayoutError(
                f"modules.{name}: items={plan.modules[name].items} must be in_order in a module "
                f"that language feeds, which takes its microbatches; remove the key"
            )


def _check_shares(plan: "Plan") -> None:
    """Checks that modules share ranks where the plan lets them run at the same time."""
    neighbours = {
        name: [
            other
            for other in plan.modules
            if other != name and not set(placement.ranks).isdisjoint(plan.modules[other].ranks)
        ]
        for name, placement in plan.modules.items()
    }
    if plan.schedule.kind == "concurrent" and not any(neighbours.values()):
        raise LayoutError(
            "schedule: kind=concurrent must find ranks that several modules share; "
            "use 1f1b, or place modules on the same ranks"
        )
    for name, placement in plan.modules.items():
        if placement.share is None:
            continue
        shown = f"modules.{name}: share.sms={placement.share.sms}"
        if plan.schedule.kind != "concurrent":
            raise LayoutError(
                f"{shown} must go with kind=concurrent, not {plan.schedule.kind}, which runs one "
                f"module at a time; remove share or change the kind"
            )
        if not neighbours[name]:
            raise LayoutError(
                f"{shown} must stand in a module that shares ranks with another; remove share"
            )
