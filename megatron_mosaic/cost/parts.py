"""Times of a module's parts on one rank: its input, its layers, its output."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mosaic.cluster.spec import Cluster
from megatron_mosaic.cost.collectives import (
    Group,
    all_gather_s,
    all_reduce_s,
    all_to_all_s,
    send_s,
)
from megatron_mosaic.cost.costs import ModuleCosts, PartCosts, PartRun
from megatron_mosaic.cost.efficiency import PassTimes, pass_times
from megatron_mosaic.cost.operations import (
    Operation,
    TaskTokens,
    Workplace,
    input_operations,
    mixer_operations,
    mlp_operations,
    output_operations,
)
from megatron_mosaic.cost.sizes import ParallelSizes, TrainingSettings
from megatron_mosaic.model.layers import Experts, LatentAttention, Layer, SelfAttention
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

# What launching a cast costs of what launching a multiplication with all around it does.
_CAST_LAUNCH = 0.5


@dataclass(frozen=True, slots=True)
class Exposed:
    """Communication that no computation hides, in seconds of each pass."""

    forward_s: float = 0.0
    backward_s: float = 0.0

    def __add__(self, other: "Exposed") -> "Exposed":
        return Exposed(self.forward_s + other.forward_s, self.backward_s + other.backward_s)


def waited_s(communication_s: float, *, behind_s: float, cost: float) -> float:
    """What communication costs that runs beside a computation.

    Args:
        communication_s: Its time.
        behind_s: Time of the computation.
        cost: Time that the computation loses for each second of it.
    """
    hidden = min(communication_s, behind_s)
    return communication_s - hidden + cost * hidden


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """A module as one of its ranks sees it: what to compute, and who shares in it.

    Args:
        cluster: What it runs on.
        place: What its operations have in common.
        tensor: Ranks that split every multiplication.
        context: Ranks that split every sequence.
        expert: Ranks that split the list of experts.
    """

    cluster: Cluster
    place: Workplace
    tensor: Group
    context: Group
    expert: Group

    @classmethod
    def of(
        cls,
        module: ModuleSpec,
        *,
        sizes: ParallelSizes,
        samples: float,
        cluster: Cluster,
        settings: TrainingSettings,
        precision: Precision,
    ) -> "Site":
        """The site of a task of some samples."""
        return cls(
            cluster=cluster,
            place=Workplace(
                hidden_size=module.hidden_size,
                task=TaskTokens.of(module, samples=samples, cp=sizes.cp),
                sizes=sizes,
                settings=settings,
                precision=precision,
            ),
            tensor=Group.of(cluster, size=sizes.tp, stride=1),
            context=Group.of(cluster, size=sizes.cp, stride=sizes.tp),
            expert=Group.of(cluster, size=sizes.ep, stride=sizes.etp),
        )

    def times(self, operations: Sequence[Operation]) -> PassTimes:
        """Seconds of operations in each pass."""
        gradient_bytes = self.place.settings.gradient_bytes
        return pass_times(self.cluster.gpu, operations, gradient_bytes=gradient_bytes)


def module_costs(
    module: ModuleSpec,
    *,
    sizes: ParallelSizes,
    samples: float,
    cluster: Cluster,
    settings: TrainingSettings,
    precision: Precision,
) -> ModuleCosts:
    """Estimates all parts of a module under some sizes, for a task of some samples."""
    site = Site.of(
        module,
        sizes=sizes,
        samples=samples,
        cluster=cluster,
        settings=settings,
        precision=precision,
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
    return _part(
        _launched(times, exposed, (*mixer, *mlp), site),
        exposed,
        operations=(*mixer, *mlp),
        recompute=sizes.recompute,
        parameters=weights.dense,
        expert_parameters=weights.experts,
        trainable=_layer_share(layer, module, weights.total, tp=sizes.tp),
    )


def _launched(
    times: PassTimes, exposed: Exposed, operations: Sequence[Operation], site: Site
) -> PassTimes:
    # A GPU that is faster than its host waits for it; backward launches two passes' gradients.
    if site.place.settings.cuda_graph != "none":
        return times
    launches = sum(_LAUNCHES.get(it.curve, 1) for it in operations)
    if site.place.precision in ("fp8", "mxfp8", "nvfp4"):
        # Inputs and gradients are quantised by kernels of their own.
        launches += _CAST_LAUNCH * sum(it.weights > 0 for it in operations)
    host_s = site.cluster.gpu.host_operation_s * launches
    forward_s = max(times.forward_s, host_s - exposed.forward_s)
    backward = times.input_gradient_s + times.weight_gradient_s + exposed.backward_s
    behind = max(0.0, 1.5 * host_s - backward)
    return times._replace(forward_s=forward_s, input_gradient_s=times.input_gradient_s + behind)


def input_costs(module: ModuleSpec, site: Site) -> PartCosts:
    """Estimates what makes a module's first tokens; nobody needs the gradient of its input."""
    operations = input_operations(module, site.place)
    times = site.times(operations)
    gradient_s = times.weight_gradient_s
    if not isinstance(module.input, Patches):
        gradient_s += times.input_gradient_s
    exposed = tensor_exposed(site, times, pairs=1) if operations else Exposed()
    parameters = input_parameters(module, tp=site.place.sizes.tp)
    return _part(
        PassTimes(times.forward_s, 0.0, gradient_s, 0.0),
        exposed,
        operations=operations,
        recompute=None,
        parameters=parameters,
        trainable=_share(module, "input"),
    )


def output_costs(module: ModuleSpec, site: Site) -> PartCosts:
    """Estimates what becomes of a module's last tokens."""
    operations = output_operations(module, site.place)
    times = site.times(operations)
    exposed = Exposed()
    if isinstance(module.output, LanguageHead):
        # The logits stay split; what all ranks need before is gathered, and its gradient summed.
        exposed = tensor_exposed(site, times, pairs=(1 + module.output.mtp_layers) / 2)
        *_, last = module.each_layer()
        if module.output.mtp_layers:
            extra = layer_costs(last, site, module)
            depth = module.output.mtp_layers
            exposed += Exposed(
                depth * extra.forward_communication_s, depth * extra.backward_communication_s
            )
    sizes = site.place.sizes
    weights, experts = float(output_parameters(module, tp=sizes.tp, pp=sizes.pp)), 0.0
    if isinstance(module.output, LanguageHead) and module.output.mtp_layers:
        *_, last = module.each_layer()
        held = layer_parameters(
            last,
            hidden_size=module.hidden_size,
            norm=module.norm,
            tp=sizes.tp,
            ep=sizes.ep,
            etp=sizes.etp,
        )
        weights += held.dense + 2 * module.hidden_size**2
        experts += held.experts
    part = "head" if isinstance(module.output, LanguageHead) else "projector"
    return _part(
        times,
        exposed,
        operations=operations,
        recompute=None,
        parameters=weights,
        expert_parameters=experts,
        trainable=_share(module, part),
    )


def _part(
    times: PassTimes,
    exposed: Exposed,
    *,
    operations: Sequence[Operation],
    recompute: str | None,
    parameters: float,
    expert_parameters: float = 0.0,
    trainable: float = 1.0,
) -> PartCosts:
    forward_s = times.forward_s + exposed.forward_s
    again = {"full": forward_s, "selective": times.core_s}.get(recompute or "", 0.0)
    return PartCosts(
        forward_s=forward_s,
        input_gradient_s=times.input_gradient_s + exposed.backward_s,
        weight_gradient_s=times.weight_gradient_s,
        recompute_s=again,
        forward_communication_s=exposed.forward_s,
        backward_communication_s=exposed.backward_s
        + (exposed.forward_s if recompute == "full" else 0.0),
        flops=sum(it.flops for it in operations),
        parameters=parameters,
        expert_parameters=expert_parameters,
        trainable=trainable,
    )


def _share(module: ModuleSpec, part: str) -> float:
    if module.trainable is None:
        return 1.0
    return float(part in module.trainable)


def _layer_share(layer: Layer, module: ModuleSpec, weights: float, *, tp: int) -> float:
    # Patterns on names stand for adapters: their gradients are a small share of the layer's.
    if module.trainable is None or "layers" in module.trainable:
        return 1.0
    if module.lora_rank and any("*" in name for name in module.trainable):
        adapters = adapter_parameters(
            layer, hidden_size=module.hidden_size, lora_rank=module.lora_rank, tp=tp
        )
        return min(1.0, adapters / weights)
    return 0.0


def tensor_exposed(site: Site, times: PassTimes, *, pairs: float = 1) -> Exposed:
    """Communication of one block of tensor-parallel multiplications.

    With sequence parallelism tokens are gathered before it and summed and scattered after it;
    backward gathers the output's gradient, and hides what it gathers once more behind the input's
    gradient and what it scatters behind the weights'. Without, both passes sum all tokens.

    Args:
        site: Where.
        times: Of the block; its gradient of weights hides a part.
        pairs: Pairs of a collective before and one after.

    Source:
        Korthikanti et al., arXiv 2205.05198, section 4.2.2; Megatron-LM's tensor_parallel/layers.py.
    """
    sizes, settings = site.place.sizes, site.place.settings
    cost = site.cluster.gpu.overlap_cost
    if sizes.tp == 1:
        return Exposed()
    total = 2 * site.place.task.tokens * site.place.hidden_size
    if not sizes.sequence_parallel:
        summed = pairs * all_reduce_s(site.tensor, total_bytes=total)
        behind = waited_s(summed, behind_s=times.weight_gradient_s, cost=cost)
        return Exposed(summed, behind)
    gathered = pairs * all_gather_s(site.tensor, total_bytes=total)
    # User buffers send a part while the next one is multiplied: only the first is waited for.
    once = gathered * (1 / sizes.tp + cost) if settings.tp_comm_overlap else gathered
    behind = waited_s(gathered, behind_s=times.input_gradient_s, cost=cost)
    behind += waited_s(gathered, behind_s=times.weight_gradient_s, cost=cost)
    return Exposed(2 * once, once + behind)


def context_exposed(layer: Layer, site: Site, operations: Sequence[Operation]) -> Exposed:
    """Communication between the ranks that split a sequence.

    Around a ring, keys and values of the next rank arrive while those of the last one are
    attended to; backward they come once more, with their gradients. An all-to-all waits.

    Source:
        Ring attention: Liu et al., arXiv 2310.01889. All-to-all: Jacobs et al., arXiv 2309.14509.
    """
    sizes, task = site.place.sizes, site.place.task
    if sizes.cp == 1:
        return Exposed()
    match layer.mixer:
        case SelfAttention() as mixer:
            queries = mixer.num_heads * mixer.head_dim / sizes.tp
            keys = max(mixer.num_query_groups / sizes.tp, 1) * mixer.head_dim
        case LatentAttention() as mixer:
            queries = mixer.num_heads * (mixer.head_dim + mixer.rotary_head_dim) / sizes.tp
            keys = queries
        case _:
            return Exposed()
    if site.place.settings.cp_comm == "a2a":
        sent = 2 * task.tokens * (2 * queries + 2 * keys)
        moved = all_to_all_s(site.context, sent_bytes=sent)
        return Exposed(moved, moved)
    hop = send_s(site.context.far, message_bytes=2 * task.tokens * 2 * keys)
    core = site.times([it for it in operations if it.core])
    steps, step, cost = sizes.cp - 1, 1 / sizes.cp, site.cluster.gpu.overlap_cost
    return Exposed(
        steps * waited_s(hop, behind_s=core.forward_s * step, cost=cost),
        steps * waited_s(2 * hop, behind_s=core.input_gradient_s * step, cost=cost),
    )


def mlp_exposed(layer: Layer, site: Site, times: PassTimes) -> Exposed:
    """Communication of what follows the mixer: as any block, or as experts that tokens go to."""
    if not isinstance(layer.mlp, Experts):
        return tensor_exposed(site, times)
    place, mlp = site.place, layer.mlp
    exposed = tensor_exposed(site, times) if mlp.shared_ffn_hidden_size else Exposed()
    if place.settings.cuda_graph != "full":
        launched_s = _launch_experts_s(mlp, site)
        exposed += Exposed(launched_s, launched_s)
    if place.sizes.ep > 1:
        sent_s = 2 * dispatch_s(mlp, site)
        if place.settings.moe_overlap:
            gpu = site.cluster.gpu
            computed = (times.forward_s + times.input_gradient_s + times.weight_gradient_s) / 2
            sent_s = waited_s(sent_s, behind_s=computed, cost=gpu.overlap_cost)
        exposed += Exposed(sent_s, sent_s)
    if place.sizes.etp > 1:
        etp = Group.of(site.cluster, size=place.sizes.etp, stride=1)
        rows = place.own_tokens * mlp.experts_per_token * place.sizes.etp
        gathered = all_gather_s(etp, total_bytes=2 * rows * (mlp.latent_size or place.hidden_size))
        exposed += Exposed(2 * gathered, 2 * gathered)
    return exposed


def _launch_experts_s(mlp: Experts, site: Site) -> float:
    # The host learns how many tokens came, and launches kernels for each expert after that.
    waits, precision = site.cluster.gpu.host_expert_s, site.place.precision
    each = waits.get("bf16" if precision in ("bf16", "fp16", "fp32") else "fp8", 0.0)
    kernels = 2 if mlp.bias else 1
    return kernels * each * mlp.num_experts / site.place.sizes.ep


def dispatch_s(mlp: Experts, site: Site) -> float:
    """Time to send tokens to their experts, or back.

    ``alltoall`` sends a copy for every expert. ``flex`` sends one copy to each node that has some
    of a token's experts, and there one to each such rank: with experts chosen evenly, ``n`` of
    them are on ``k * (1 - (1 - 1/k)^n)`` of ``k`` places.
    """
    place, group = site.place, site.expert
    size_bytes = 2 * (mlp.latent_size or place.hidden_size) * place.own_tokens
    copies, ep = mlp.experts_per_token, group.size
    if place.settings.moe_dispatcher == "alltoall":
        return all_to_all_s(group, sent_bytes=copies * size_bytes)
    ranks = _places(ep, copies)
    if group.one_block:
        return all_to_all_s(group, sent_bytes=ranks * size_bytes)
    num_nodes = group.size / group.near_size
    far = _places(num_nodes, copies) * size_bytes
    nodes = Group(
        size=round(num_nodes), near_size=1, near=group.far, far=group.far
    )
    near = Group(size=group.near_size, near_size=group.near_size, near=group.near, far=group.near)
    return max(
        all_to_all_s(nodes, sent_bytes=far), all_to_all_s(near, sent_bytes=ranks * size_bytes)
    )


def _places(places: float, copies: float) -> float:
    return places * (1 - (1 - 1 / places) ** copies)
