"""Communication inside a module's parts that no computation hides."""

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
from megatron_mosaic.cost.context import ContextTask
from megatron_mosaic.cost.efficiency import PassBytes, PassTimes, pass_bytes, pass_times
from megatron_mosaic.cost.operations import Operation, TaskTokens, Workplace
from megatron_mosaic.cost.sizes import ParallelSizes, TrainingSettings
from megatron_mosaic.layout.attention import KeyExchange
from megatron_mosaic.model.layers import Experts, LatentAttention, Layer, SelfAttention
from megatron_mosaic.model.spec import ModuleSpec, Precision


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
        context: ContextTask | None = None,
    ) -> "Site":
        """The site of a task of some samples.

        Args:
            module: The module.
            sizes: How it is split.
            samples: Samples of the task.
            cluster: What it runs on.
            settings: What the run does alike for all modules.
            precision: Of the multiplications inside layers.
            context: What a context-parallel rank has to do under a multimodal mask.
        """
        return cls(
            cluster=cluster,
            place=Workplace(
                hidden_size=module.hidden_size,
                task=TaskTokens.of(module, samples=samples, cp=sizes.cp, context=context),
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

    def moved(self, operations: Sequence[Operation]) -> PassBytes:
        """Bytes that operations read and write in each pass."""
        return pass_bytes(operations, gradient_bytes=self.place.settings.gradient_bytes)


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
        Korthikanti et al., arXiv 2205.05198, section 4.2.2.
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
    attended to; backward they come once more, with their gradients. An all-to-all waits. Under a
    multimodal mask those that are seen come, as ``keys_exposed`` says.

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
    if task.context is not None:
        core = site.times([it for it in operations if it.core])
        return keys_exposed(task.context, site, core, token_bytes=2 * 2 * keys)
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


def keys_exposed(task: ContextTask, site: Site, core: PassTimes, *, token_bytes: float) -> Exposed:
    """Communication of keys and values under a multimodal mask.

    They arrive while a rank attends to those that it holds; backward their gradients go back
    while it does the same, always as blocks, so that they are added in a known order.

    Args:
        task: What the rank has to do.
        site: Where.
        core: Times of its attention.
        token_bytes: Of keys and values of a token.
    """
    cost, own = site.cluster.gpu.overlap_cost, task.own_share
    there_s = keys_s(task, site.context, kind=site.place.sizes.keys, token_bytes=token_bytes)
    back_s = keys_s(task, site.context, kind="blocks", token_bytes=token_bytes)
    return Exposed(
        waited_s(there_s, behind_s=own * core.forward_s, cost=cost),
        waited_s(back_s, behind_s=own * core.input_gradient_s, cost=cost),
    )


def keys_s(task: ContextTask, group: Group, *, kind: KeyExchange, token_bytes: float) -> float:
    """Time in which keys and values reach the ranks whose queries see them.

    Blocks come from all ranks alike: where most of them come from near ones, it is less.

    Args:
        task: What a rank has to do.
        group: Ranks that share the sequences.
        kind: How they travel; ``auto`` is what takes less time.
        token_bytes: Of keys and values of a token.
    """
    others = group.size / max(group.size - 1, 1)
    blocks_s = all_to_all_s(group, sent_bytes=others * task.received * token_bytes)
    gather_s = all_gather_s(group, total_bytes=group.size * task.tokens * token_bytes)
    return {"blocks": blocks_s, "all_gather": gather_s, "auto": min(blocks_s, gather_s)}[kind]


def mlp_exposed(layer: Layer, site: Site, times: PassTimes) -> Exposed:
    """Communication of what follows the mixer: as any block, or as experts that tokens go to."""
    if not isinstance(layer.mlp, Experts):
        return tensor_exposed(site, times)
    place, mlp = site.place, layer.mlp
    exposed = tensor_exposed(site, times) if mlp.shared_ffn_hidden_size else Exposed()
    launched_s = launch_experts_s(layer, site)
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


def launch_experts_s(layer: Layer, site: Site) -> float:
    """Time in which the host launches experts' kernels, once it knows how many tokens came."""
    if not isinstance(layer.mlp, Experts) or site.place.settings.cuda_graph == "full":
        return 0.0
    waits, precision = site.cluster.gpu.host_expert_s, site.place.precision
    each = waits.get("bf16" if precision in ("bf16", "fp16", "fp32") else "fp8", 0.0)
    kernels = 2 if layer.mlp.bias else 1
    return kernels * each * layer.mlp.num_experts / site.place.sizes.ep


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
    nodes = Group(size=round(num_nodes), near_size=1, near=group.far, far=group.far)
    near = Group(size=group.near_size, near_size=group.near_size, near=group.near, far=group.near)
    return max(
        all_to_all_s(nodes, sent_bytes=far), all_to_all_s(near, sent_bytes=ranks * size_bytes)
    )


def _places(places: float, copies: float) -> float:
    return places * (1 - (1 - 1 / places) ** copies)
