"""Faults that break the runtime of rank processes, each in one way. A rehearsal must find all.

Each is called once on every rank, before anything runs.
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

from megatron_mosaic.schedule.steps import Compute, Post, Wait


def swapped_ranks_in_a_group(rank: int) -> None:
    from megatron_mosaic.comm.groups import GroupFactory

    group = GroupFactory.group

    def swapped(self: Any, ranks: Any, *, scope: str, backend: str | None = None) -> Any:
        ranks = tuple(reversed(ranks)) if scope == "language" else ranks
        return group(self, ranks, scope=scope, backend=backend)

    GroupFactory.group = swapped


def _with_steps(edit: Callable[[list[Any]], list[Any]]) -> None:
    from megatron_mosaic.host import forward_backward

    steps_of = forward_backward.steps_of
    forward_backward.steps_of = lambda *plan: tuple(edit(list(steps_of(*plan))))


def dropped_dependency(rank: int) -> None:
    """One backward task does not wait for its gradient: an older one is as good."""
    from megatron_mosaic.engine.walk import Walker

    wait = Walker._step
    latest: dict[Any, Any] = {}

    def step_without_waiting(self: Any, position: int, step: Any) -> None:
        if isinstance(step, Wait) and step.transfer.microbatch == 1 and rank == 0:
            key = (step.transfer.kind, step.transfer.edge)
            self._under_way.append(self._awaited.pop(step.transfer))
            self._arrived[step.transfer] = latest[key]
            return
        wait(self, position, step)
        if isinstance(step, Wait):
            key = (step.transfer.kind, step.transfer.edge)
            latest[key] = self._arrived[step.transfer]

    Walker._step = step_without_waiting


def sends_posted_in_unlike_order(rank: int) -> None:
    """Rank 0 posts two transfers of one edge the other way round; gloo may not mind."""
    if rank == 0:
        _with_steps(_swap_first_posts)


def _swap_first_posts(steps: list[Any]) -> list[Any]:
    places = [place for place, step in enumerate(steps) if isinstance(step, Post)]
    for one, other in pairwise(places):
        if other == one + 1:
            steps[one], steps[other] = steps[other], steps[one]
            break
    return steps


def wrong_microbatch_order(rank: int) -> None:
    """The language model's rank 0 takes its second microbatch first, as all of its transfers do."""
    from megatron_mosaic.host.runner import ModuleRunner

    begin = ModuleRunner.begin

    def begin_swapped(self: Any, work: Any) -> None:
        keys = list(work.batches)
        if self.name == "language" and len(keys) > 1:
            values = [work.batches[key] for key in keys]
            values[0], values[1] = values[1], values[0]
            work = replace(work, batches=dict(zip(keys, values, strict=True)))
        begin(self, work)

    ModuleRunner.begin = begin_swapped


def wrong_gradient_scale(rank: int) -> None:
    """The encoder's gradient counts twice."""
    from megatron_mosaic.host import forward_backward

    finalize = forward_backward.finalize_gradients

    def finalize_and_double(runners: Any, hosted: Any, **options: Any) -> None:
        finalize(runners, hosted, **options)
        runners["vision"].wrapped.scale_gradients(2.0)

    forward_backward.finalize_gradients = finalize_and_double


def gradient_not_divided_by_replicas(rank: int) -> None:
    from megatron_mosaic.host import forward_backward

    finalize = forward_backward.finalize_gradients

    def finalize_unscaled(*args: Any, loss_replicas: int, **options: Any) -> None:
        finalize(*args, loss_replicas=1, **options)

    forward_backward.finalize_gradients = finalize_unscaled


def replicas_train_apart(rank: int) -> None:
    """Gradients are not reduced over the replicas of one module."""
    from megatron_mosaic.host import groups

    for field in ("dp", "dp_cp", "dp_cp_gtp_remat", "intra_dp_cp"):
        groups.AXES_OF_FIELD[field] = ()


def replicas_of_experts_train_apart(rank: int) -> None:
    from megatron_mosaic.host import groups

    for field in ("expt_dp", "expt_dp_gtp_remat", "intra_expt_dp"):
        groups.EXPERT_AXES_OF_FIELD[field] = ()


def stale_route(rank: int) -> None:
    """The rows of the second step go where those of the first one went."""
    from megatron_mosaic.comm.boundary import BoundaryRoutes

    begin = BoundaryRoutes.begin
    first: dict[Any, Any] = {}

    def begin_as_before(self: Any, samples: Any, **options: Any) -> None:
        begin(self, first.setdefault((id(self), len(samples)), samples), **options)

    BoundaryRoutes.begin = begin_as_before


def wrong_rank_order_in_a_route(rank: int) -> None:
    """Two replicas of the language model get each other's rows."""
    from megatron_mosaic.comm import boundary

    make = boundary.BoundarySides

    def make_swapped(*, destination: Any, **others: Any) -> Any:
        first, second = (destination.rank_at(dp=dp) for dp in (0, 1))
        swapped = {first: second, second: first}
        ranks = tuple(swapped.get(each, each) for each in destination.ranks)
        return make(destination=replace(destination, ranks=ranks), **others)

    boundary.BoundarySides = make_swapped


def _on_posts(change: Callable[[Any, int, Any], Any]) -> None:
    from megatron_mosaic.comm import boundary

    post = boundary.BoundaryChannel.post

    def post_changed(self: Any, microbatch: int, leaving: Any) -> Any:
        if leaving is not None:
            leaving = change(self._direction, microbatch, leaving)
        return post(self, microbatch, leaving)

    boundary.BoundaryChannel.post = post_changed


def lost_boundary_gradient(rank: int) -> None:
    _on_posts(
        lambda direction, microbatch, leaving: (
            leaving * 0 if direction == "gradient" and microbatch == 1 else leaving
        )
    )


def rounded_activations(rank: int) -> None:
    """Rows lose half of their digits on the way."""
    _on_posts(
        lambda direction, _, leaving: (
            leaving.bfloat16().float() if direction == "activation" else leaving
        )
    )


def collective_out_of_order(rank: int) -> None:
    """Rank 0 reduces two groups the other way round, without waiting between them."""
    import torch
    import torch.distributed as dist

    from megatron_mosaic.host import forward_backward

    finalize = forward_backward.finalize_gradients

    def finalize_and_reduce(runners: Any, hosted: Any, **options: Any) -> None:
        finalize(runners, hosted, **options)
        collection = hosted["language"].collection
        groups = [collection.tp, collection.tp]
        sizes = [1, 2] if rank else [2, 1]
        works = [
            dist.all_reduce(torch.ones(size), group=group, async_op=True)
            for size, group in zip(sizes, groups, strict=True)
        ]
        del works

    forward_backward.finalize_gradients = finalize_and_reduce


def sends_that_only_tags_match(rank: int) -> None:
    """Rank 1 receives two messages the other way round; NCCL, without tags, would mix them up."""
    import torch
    import torch.distributed as dist

    from megatron_mosaic.host import forward_backward

    finalize = forward_backward.finalize_gradients

    def finalize_and_exchange(runners: Any, hosted: Any, **options: Any) -> None:
        finalize(runners, hosted, **options)
        group = hosted["language"].collection.pp
        start = dist.irecv if rank else dist.isend
        sizes = [2, 1] if rank else [1, 2]
        works = [start(torch.ones(n), 1 - rank, group=group, tag=100 + n) for n in sizes]
        for work in works:
            work.wait()

    forward_backward.finalize_gradients = finalize_and_exchange


def collective_on_one_rank_alone(rank: int) -> None:
    """Rank 0 sends a message that nobody waits for; gloo buffers it."""
    import torch
    import torch.distributed as dist

    from megatron_mosaic.host import forward_backward

    finalize = forward_backward.finalize_gradients

    def finalize_and_send(runners: Any, hosted: Any, **options: Any) -> None:
        finalize(runners, hosted, **options)
        if rank == 0:
            dist.isend(torch.ones(1), 1)

    forward_backward.finalize_gradients = finalize_and_send


def missing_lane_event(rank: int) -> None:
    """No step waits for one of another lane."""
    _with_walk(
        lambda walk: replace(walk, steps=tuple(each._replace(after=()) for each in walk.steps))
    )


def missing_event_of_the_loop(rank: int) -> None:
    """Lanes begin before the training loop has handed the memory over."""
    _with_walk(lambda walk: replace(walk, joined=walk.joined._replace(begin=())))


def _with_walk(change: Callable[[Any], Any]) -> None:
    from megatron_mosaic.host import forward_backward

    in_lanes = forward_backward.in_lanes
    forward_backward.in_lanes = lambda *args, **options: change(in_lanes(*args, **options))


def frozen_part_trains(rank: int) -> None:
    _after_freezing(lambda name: True if name.startswith("vision_model.") else None)


def trainable_part_is_frozen(rank: int) -> None:
    _after_freezing(lambda name: False if "output_layer" in name else None)


def _after_freezing(trains: Callable[[str], bool | None]) -> None:
    """Changes what trains behind the check of it."""
    from megatron_mosaic.host import model

    check = model.check_trainable

    def check_then_change(module: Any, *args: Any, **options: Any) -> Any:
        stage = check(module, *args, **options)
        for name, parameter in module.named_parameters():
            wish = trains(name)
            if wish is not None:
                parameter.requires_grad_(wish)
        return stage

    model.check_trainable = check_then_change


def wrong_replica_id_in_a_checkpoint(rank: int) -> None:
    """Every rank takes its part of the language model for another rank's copy."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    make = ShardedTensor.from_rank_offsets

    def make_copy(key: str, *args: Any, replica_id: Any = 0, **options: Any) -> Any:
        if "decoder" in key:
            replica_id = (0, 0, 1)
        return make(key, *args, replica_id=replica_id, **options)

    ShardedTensor.from_rank_offsets = make_copy


def weight_missing_in_a_checkpoint(rank: int) -> None:
    """A weight is not in what a module saves and loads."""
    from megatron.core.transformer.mlp import MLP

    state = MLP.sharded_state_dict

    def state_without(self: Any, *args: Any, **options: Any) -> Any:
        every = state(self, *args, **options)
        return {key: value for key, value in every.items() if "linear_fc2.weight" not in key}

    MLP.sharded_state_dict = state_without


def optimizer_state_not_loaded(rank: int) -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    load = DistributedOptimizer.load_state_dict

    def load_nothing(self: Any, state: Any) -> None:
        load(self, state)
        for values in self.optimizer.state.values():
            values["exp_avg"].zero_()

    DistributedOptimizer.load_state_dict = load_nothing


def ranks_begin_with_unlike_weights(rank: int) -> None:
    from megatron_mosaic.host import model

    initialize = model.initialize_by_name

    def initialize_apart(module: Any, *, seed: int, groups: Any) -> Any:
        return initialize(module, seed=seed + rank, groups=groups)

    model.initialize_by_name = initialize_apart


def layers_on_other_stages(rank: int) -> None:
    """The first stage has as many layers as the last one should, and the other way round."""
    from megatron_mosaic.layout.plan import Plan

    load = Plan.load

    def load_reversed(path: Any) -> Any:
        plan = load(path)
        split = plan.language.layers_per_stage
        language = replace(plan.language, layers_per_stage=split[::-1])
        return replace(plan, modules={**plan.modules, "language": language})

    Plan.load = load_reversed


def tensor_parallel_norms_not_reduced(rank: int) -> None:
    """With sequence parallelism each rank has a part of the gradient of a norm."""
    # The package has a function of the module's name.
    module: Any = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    module._allreduce_non_tensor_model_parallel_grads = lambda *args, **options: None


def reported_losses_of_one_replica(rank: int) -> None:
    """Ranks report the loss of their own replica."""
    from megatron_mosaic.host.loss_report import LossReport

    reduce = LossReport.reduce

    def reduce_own(self: Any, losses: Any, **options: Any) -> Any:
        reported, num_tokens = reduce(self, losses, **options)
        for entry in reported:
            for name in entry:
                entry[name] = entry[name] * (1.0 + 0.1 * rank)
        return reported, num_tokens

    LossReport.reduce = reduce_own


def rank_dies(rank: int) -> None:
    from megatron_mosaic.host.runner import ModuleRunner

    backward = ModuleRunner.backward

    def die(self: Any, task: Any, received: Any) -> Any:
        if rank == 1 and task.microbatches[0] == 2:
            os._exit(7)
        return backward(self, task, received)

    ModuleRunner.backward = die


def task_left_out(rank: int) -> None:
    """Rank 0 leaves out its last backward task, and all that belongs to it."""
    if rank == 0:
        _with_steps(_without_last_backward)


def _without_last_backward(steps: list[Any]) -> list[Any]:
    last = [
        place
        for place, step in enumerate(steps)
        if isinstance(step, Compute) and step.task.kind == "B"
    ]
    return steps[: last[-1]] if last else steps
