"""Times of a module's parts on one rank: its input, its layers, its output."""

from collections.abc import Sequence

from megatron_mosaic.cluster.spec import Cluster
from megatron_mosaic.cost.collectives import Group, send_s
from megatron_mosaic.cost.context import ContextTask
from megatron_mosaic.cost.costs import ModuleCosts, PartCosts, PartRun
from megatron_mosaic.cost.efficiency import PassBytes, PassTimes
from megatron_mosaic.cost.end_operations import input_operations, output_operations
from megatron_mosaic.cost.exposed import (
    Exposed,
    Site,
    context_exposed,
    launch_experts_s,
    mlp_exposed,
    tensor_exposed,
)
from megatron_mosaic.cost.operations import Operation, mixer_operations, mlp_operations
from megatron_mosaic.cost.sizes import ParallelSizes, TrainingSettings
from megatron_mosaic.model.layers import Layer
from megatron_mosaic.model.parameters import (
    adapter_parameters,
    input_parameters,
    layer_parameters,
    output_parameters,
)
from megatron_mosaic.model.spec import LanguageHead, ModuleSpec, Patches, Precision

# Kernels of an operation, in launches of a multiplication with all around it. Chunked scans are
# a chain of kernels: sums in chunks, products of keys, a triangular inverse, states, outputs.
_LAUNCHES = {"elementwise": 0, "recurrence": 4}

NOTHING = Exposed()

# What launching a backward pass costs of what launching the forward one does: it launches the
# gradients of both operands, but little around them.
_BACKWARD_LAUNCH = 1.5

# What launching a cast costs of what launching a multiplication with all around it does.
_CAST_LAUNCH = 0.5


def module_costs(
    module: ModuleSpec,
    *,
    sizes: ParallelSizes,
    samples: float,
    cluster: Cluster,
    settings: TrainingSettings,
    precision: Precision,
    context: ContextTask | None = None,
) -> ModuleCosts:
    """Estimates all parts of a module under some sizes, for a task of some samples.

    Args:
        module: The module.
        sizes: How it is split.
        samples: Samples of the task.
        cluster: What it runs on.
        settings: What the run does alike for all modules.
        precision: Of the multiplications inside layers.
        context: What a context-parallel rank has to do under a multimodal mask.
    """
    site = Site.of(
        module,
        sizes=sizes,
        samples=samples,
        cluster=cluster,
        settings=settings,
        precision=precision,
        context=context,
    )
    known: dict[Layer, PartCosts] = {}
    runs = []
    for count, layer in module.layers:
        if layer not in known:
            known[layer] = layer_costs(layer, site, module)
        runs.append(PartRun(count, known[layer]))
    hop_bytes = 2 * site.place.own_tokens * module.hidden_size
    if settings.split_hops and not sizes.sequence_parallel:
        hop_bytes /= sizes.tp
    stage = Group.of(cluster, size=2, stride=sizes.tp * sizes.cp * sizes.dp)
    return ModuleCosts(
        name=module.name,
        sizes=sizes,
        input=input_costs(module, site),
        layers=tuple(runs),
        output=output_costs(module, site),
        hop_s=send_s(stage.far, message_bytes=hop_bytes) if sizes.pp > 1 else 0.0,
        hop_bytes=hop_bytes if sizes.pp > 1 else 0.0,
    )


def layer_costs(layer: Layer, site: Site, module: ModuleSpec) -> PartCosts:
    """Estimates one layer."""
    mixer = mixer_operations(layer, site.place)
    mlp = mlp_operations(layer, site.place)
    mixer_times, mlp_times = site.times(mixer), site.times(mlp)
    exposed = Exposed()
    if mixer:
        exposed += tensor_exposed(site, mixer_times) + context_exposed(layer, site, mixer)
    if mlp:
        exposed += mlp_exposed(layer, site, mlp_times)
    sizes = site.place.sizes
    weights = layer_parameters(
        layer,
        hidden_size=module.hidden_size,
        norm=module.norm,
        tp=sizes.tp,
        ep=sizes.ep,
        etp=sizes.etp,
    )
    times = PassTimes(*(a + b for a, b in zip(mixer_times, mlp_times, strict=True)))
    evened, host_s = _evened(times, mixer, site), _host_s((*mixer, *mlp), site)
    launched = _launched(times, exposed, host_s)
    return _part(
        launched,
        exposed,
        moved=site.moved((*mixer, *mlp)),
        host_s=host_s,
        experts_host_s=launch_experts_s(layer, site),
        operations=(*mixer, *mlp),
        recompute=sizes.recompute,
        parameters=weights.dense,
        expert_parameters=weights.experts,
        trainable=_layer_share(layer, module, weights.total, tp=sizes.tp),
        waits=_waits(launched, _launched(evened, exposed, host_s)),
    )


def _waits(slowest: PassTimes, mean: PassTimes) -> Exposed:
    return Exposed(
        slowest.forward_s - mean.forward_s, slowest.input_gradient_s - mean.input_gradient_s
    )


def _evened(times: PassTimes, mixer: Sequence[Operation], site: Site) -> PassTimes:
    """Times of a layer if attention took the slowest rank no longer than the mean of all."""
    task = site.place.task.context
    if task is None or site.place.sizes.cp == 1:
        return times
    core = site.times([it for it in mixer if it.core])
    return times._replace(
        forward_s=times.forward_s - task.wait_share * core.forward_s,
        input_gradient_s=times.input_gradient_s - task.wait_share * core.input_gradient_s,
    )


def _host_s(operations: Sequence[Operation], site: Site) -> float:
    """Time in which the host launches a layer's forward pass."""
    if site.place.settings.cuda_graph != "none":
        return 0.0
    launches = sum(_LAUNCHES.get(it.curve, 1) for it in operations)
    if site.place.precision in ("fp8", "mxfp8", "nvfp4"):
        # Inputs and gradients are quantised by kernels of their own.
        launches += _CAST_LAUNCH * sum(it.weights > 0 for it in operations)
    return site.cluster.gpu.host_operation_s * launches


def _launched(times: PassTimes, exposed: Exposed, host_s: float) -> PassTimes:
    # A GPU that is faster than its host waits for it.
    forward_s = max(times.forward_s, host_s - exposed.forward_s)
    backward = times.input_gradient_s + times.weight_gradient_s + exposed.backward_s
    behind = max(0.0, _BACKWARD_LAUNCH * host_s - backward)
    return times._replace(forward_s=forward_s, input_gradient_s=times.input_gradient_s + behind)


def input_costs(module: ModuleSpec, site: Site) -> PartCosts:
    """Estimates what makes a module's first tokens; nobody needs the gradient of its input."""
    operations = input_operations(module, site.place)
    times, moved = site.times(operations), site.moved(operations)
    gradient_s, gradient_bytes = times.weight_gradient_s, moved.weight_gradient
    if not isinstance(module.input, Patches):
        gradient_s += times.input_gradient_s
        gradient_bytes += moved.input_gradient
    exposed = tensor_exposed(site, times, pairs=1) if operations else Exposed()
    parameters = input_parameters(module, tp=site.place.sizes.tp)
    return _part(
        PassTimes(times.forward_s, 0.0, gradient_s, 0.0),
        exposed,
        moved=PassBytes(moved.forward, 0.0, gradient_bytes),
        operations=operations,
        recompute=None,
        parameters=parameters,
        trainable=float(module.trains("input")),
    )


def output_costs(module: ModuleSpec, site: Site) -> PartCosts:
    """Estimates what becomes of a module's last tokens."""
    operations = output_operations(module, site.place)
    times, sizes = site.times(operations), site.place.sizes
    exposed, experts = Exposed(), 0.0
    weights = float(output_parameters(module, tp=sizes.tp, pp=sizes.pp))
    if isinstance(module.output, LanguageHead):
        depth = module.output.mtp_layers
        # The logits stay split; what all ranks need before is gathered, and its gradient summed.
        exposed = tensor_exposed(site, times, pairs=(1 + depth) / 2)
        if depth:
            *_, last = module.each_layer()
            extra = layer_costs(last, site, module)
            exposed += Exposed(
                depth * extra.forward_communication_s, depth * extra.backward_communication_s
            )
            # All levels of prediction that a run repeats share one layer's weights.
            weights += extra.parameters + 2 * module.hidden_size**2
            experts += extra.expert_parameters
    return _part(
        times,
        exposed,
        moved=site.moved(operations),
        operations=operations,
        recompute=None,
        parameters=weights,
        expert_parameters=experts,
        trainable=float(module.trains("output")),
    )


def _part(
    times: PassTimes,
    exposed: Exposed,
    *,
    moved: PassBytes,
    operations: Sequence[Operation],
    recompute: str | None,
    host_s: float = 0.0,
    experts_host_s: float = 0.0,
    parameters: float,
    expert_parameters: float = 0.0,
    trainable: float = 1.0,
    waits: Exposed = NOTHING,
) -> PartCosts:
    forward_s = times.forward_s + exposed.forward_s
    passes = 2 if recompute == "full" else 1
    again = {"full": forward_s, "selective": times.core_s}.get(recompute or "", 0.0)
    return PartCosts(
        forward_s=forward_s,
        input_gradient_s=times.input_gradient_s + exposed.backward_s,
        weight_gradient_s=times.weight_gradient_s,
        recompute_s=again,
        forward_communication_s=exposed.forward_s,
        backward_communication_s=exposed.backward_s
        + (exposed.forward_s if recompute == "full" else 0.0),
        forward_imbalance_s=waits.forward_s,
        backward_imbalance_s=waits.backward_s + (waits.forward_s if recompute else 0.0),
        flops=sum(it.flops for it in operations),
        forward_bytes=moved.forward,
        input_gradient_bytes=moved.input_gradient,
        weight_gradient_bytes=moved.weight_gradient,
        forward_host_s=host_s + experts_host_s,
        backward_host_s=(_BACKWARD_LAUNCH + passes - 1) * host_s + passes * experts_host_s,
        recompute_bytes={"full": moved.forward, "selective": moved.core}.get(recompute or "", 0.0),
        parameters=parameters,
        expert_parameters=expert_parameters,
        trainable=trainable,
    )


def _layer_share(layer: Layer, module: ModuleSpec, weights: float, *, tp: int) -> float:
    # Patterns on names stand for adapters: their gradients are a small share of the layer's.
    if module.trains("layers"):
        return 1.0
    if module.adapters_train:
        adapters = adapter_parameters(
            layer, hidden_size=module.hidden_size, lora_rank=module.lora_rank, tp=tp
        )
        return min(1.0, adapters / weights)
    return 0.0
