"""Reduces and scales the gradients of every module."""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.finalize_model_grads import finalize_model_grads

from megatron_mosaic.host.faults.results import results_of
from megatron_mosaic.host.groups import ModuleGroups
from megatron_mosaic.host.parallel_state_scope import ParallelStateScope
from megatron_mosaic.host.runner import ModuleRunner


def finalize_gradients(
    runners: Mapping[str, ModuleRunner],
    hosted: Mapping[str, ModuleGroups],
    *,
    num_tokens: torch.Tensor,
    per_token_loss: bool,
    loss_replicas: int,
    force_all_reduce: bool,
) -> None:
    """Reduces every module's gradients over its own replicas and scales them alike.

    The language model's gradient is a mean over its replicas, or with a per-token loss a sum
    that is divided by the tokens of the whole batch. An encoder's replicas each hold the
    gradient of some samples, however many and unlike they are: their sum is divided by the same
    number, the replicas that Megatron averages over or the tokens. An output, with a loss of its
    own, has the language model's replicas and is treated alike.

    Args:
        runners: Of each module on this rank, one of its stages.
        hosted: Groups of these modules.
        num_tokens: Tokens that count in the loss, over the whole batch.
        per_token_loss: ``--calculate-per-token-loss``.
        loss_replicas: Ranks that add up to the loss: data-parallel times context-parallel size
            of the language model.
        force_all_reduce: Whether replicas need whole gradients with a distributed optimizer.

    Note:
        Collective over each module's ranks. Every rank goes through its modules by name.
    """
    for name in sorted(runners):
        runner, collection = runners[name], hosted[name].collection
        model: Any = runner.wrapped
        with results_of(f"the gradients of {name}"):
            launch_missing_reductions(model, force_all_reduce=force_all_reduce)
            with ParallelStateScope(collection).active():
                finalize_model_grads(
                    [model],
                    num_tokens=None,
                    pg_collection=collection,
                    force_all_reduce=force_all_reduce,
                )
        if per_token_loss:
            model.scale_gradients(1.0 / num_tokens.clamp(min=1))
        elif not runner.boundary.makes_loss:
            model.scale_gradients(1.0 / loss_replicas)


def launch_missing_reductions(model: Any, *, force_all_reduce: bool) -> None:
    """Starts the reductions that no backward pass started.

    With ``--overlap-grad-reduce`` a bucket leaves when all its gradients are there. A rank whose
    samples had no image runs no backward pass of the encoder, so its buckets would never leave,
    and its replicas would wait for them.
    """
    if not model.ddp_config.overlap_grad_reduce:
        return
    for group in _bucket_groups(model):
        if not group.is_first_batch and group.grad_reduce_handle is None:
            group.start_grad_sync(force_all_reduce=force_all_reduce)


def unlink_reductions(model: Any) -> None:
    """Lets no bucket wait for the one that left before it; they are waited for after the tasks.

    With ``--ddp-reduce-scatter-with-fp32-accumulation`` Megatron waits for that one to free its
    buffer. Such a wait inside a task is for replicas that may come to theirs much later, and for
    the end of the step where their samples had no image: the schedule does not know of it.
    """
    for group in _bucket_groups(model):
        group.previous_grad_reduce_bucket_group = None


def accumulate_on_current_stream(model: Any) -> None:
    """Makes the nodes anew that accumulate a module's gradients.

    A node keeps the stream on which it was made, and Megatron makes all of them on one of its own.
    From another stream, every backward pass of a task would go over to that one and wait for it.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    wrapper: Any = model
    weights = [node.variable for node in wrapper.grad_accs]
    wrapper.grad_accs.clear()  # nothing else refers to them: a weight does not keep its node alive
    for weight in weights:
        node = weight.expand_as(weight).grad_fn.next_functions[0][0]
        node.register_hook(wrapper._make_backward_post_hook(weight))
        wrapper.grad_accs.append(node)


def gather_parameters(model: torch.nn.Module) -> None:
    """Starts the parameter gathers of ``--overlap-param-gather`` before the first task.

    Megatron starts them in forward hooks. A rank whose samples have no image runs no forward
    pass of the encoder, and its replicas would wait for it.
    """
    if not getattr(model, "remove_forward_pre_hook_handles", None):
        return
    for group in _bucket_groups(model):
        if not group.param_gather_dispatched:
            group.start_param_sync()


def finish_gathering_parameters(model: torch.nn.Module) -> None:
    """Waits for gathers that no forward task waited for."""
    for group in _bucket_groups(model):
        if group.param_gather_handle is not None:
            group.finish_param_sync(skip_next_bucket_dispatch=True)


def _bucket_groups(model: Any) -> list[Any]:
    """Units of a module's gradient and parameter communication; none if it only evaluates."""
    if not isinstance(model, DistributedDataParallel):
        return []
    wrapper: Any = model
    return wrapper.bucket_groups + wrapper.expert_parallel_bucket_groups
