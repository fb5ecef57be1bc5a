"""Reduces and scales the gradients of every module, and makes the losses global."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.finalize_model_grads import finalize_model_grads

from megatron_mosaic.errors import HostError
from megatron_mosaic.host.agreement import raise_together
from megatron_mosaic.host.runner import ModuleRunner

# Names of losses with the module that reports each, and how many values it has.
Losses = dict[str, tuple[str, int]]


def finalize_gradients(
    runners: Mapping[str, ModuleRunner],
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
        runners: Modules on this rank.
        num_tokens: Tokens that count in the loss, over the whole batch.
        per_token_loss: ``--calculate-per-token-loss``.
        loss_replicas: Ranks that add up to the loss: data-parallel times context-parallel size
            of the language model.
        force_all_reduce: Whether replicas need whole gradients with a distributed optimizer.

    Note:
        Collective over each module's ranks. Every rank goes through its modules by name.
    """
    for name in sorted(runners):
        runner = runners[name]
        model: Any = runner.model
        launch_missing_reductions(model, force_all_reduce=force_all_reduce)
        with runner.as_process():
            finalize_model_grads(
                [model],
                num_tokens=None,
                pg_collection=runner.groups.collection,
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


class LossReport:
    """Sums the losses and token counts of all ranks, so that every rank reports the same.

    The stock loop logs on the last rank of the world, whichever module that is.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._host_group = group
        # By whether it is a step of evaluation: scripts report more there.
        self._losses: dict[bool, Losses] = {}

    def reduce(
        self,
        losses: Mapping[str, Sequence[Mapping[str, torch.Tensor]]],
        *,
        num_tokens: Any,
        replicas: int,
        forward_only: bool,
    ) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
        """Makes this step's losses global.

        Args:
            losses: By module, for those that this rank reports of, an entry for each microbatch.
            num_tokens: Tokens that count in the loss of this rank; 0 where it does not report.
            replicas: Ranks that report.
            forward_only: Whether the step evaluates.

        Returns:
            One entry with the same keys, on every rank: sums of loss and tokens where the loss
            function gives both, else the mean. And the tokens of the whole batch.

        Raises:
            HostError: Two modules report a loss of the same name.
            RankError: A loss function changed what it reports.

        Note:
            Collective over the world.
        """
        own = {
            key: (name, value.numel())
            for name, entries in losses.items()
            for key, value in (entries[0] if entries else {}).items()
        }
        every = self._agreed(own, forward_only=forward_only)
        modules = {name for name, entries in losses.items() if entries}
        expected = {key: entry for key, entry in every.items() if entry[0] in modules}
        changed = own != expected
        parts = [
            torch.as_tensor(num_tokens, device=_device()).reshape(1).double(),
            torch.tensor([changed], dtype=torch.float64, device=_device()),
        ]
        for key, (name, size) in every.items():
            entries = [] if changed else [entry[key] for entry in losses.get(name, ())]
            parts.append(_total(entries, size=size, replicas=replicas))
        total = torch.cat(parts)
        dist.all_reduce(total)
        if total[1] > 0:
            raise_together(_changed(own, expected) if changed else None, group=self._host_group)
        values = total[2:].float().split([size for _, size in every.values()])
        report = dict(zip(every, values, strict=True))
        return ([report] if report else []), total[0].float()

    def _agreed(self, own: Losses, *, forward_only: bool) -> Losses:
        """Agrees on the losses' names, once: ranks without a loss do not know them."""
        if forward_only not in self._losses:
            every: list[Losses] = [{}] * dist.get_world_size()
            dist.all_gather_object(every, own, group=self._host_group)
            agreed: Losses = {}
            for key, entry in (pair for losses in every for pair in losses.items()):
                if agreed.setdefault(key, entry)[0] != entry[0]:
                    raise HostError(
                        f"loss function: reported={key} of {entry[0]} must have another name than "
                        f"that of {agreed[key][0]}; report each module's loss under its own name"
                    )
            self._losses[forward_only] = agreed
        return self._losses[forward_only]


def _total(entries: Sequence[torch.Tensor], *, size: int, replicas: int) -> torch.Tensor:
    """Sums loss and tokens over this rank's microbatches, or takes its part of a mean."""
    if not entries:
        return torch.zeros(size, dtype=torch.float64, device=_device())
    values = torch.stack([entry.detach().reshape(-1).double() for entry in entries])
    return values.sum(dim=0) if size == 2 else values.mean(dim=0) / replicas


def _changed(own: Losses, expected: Losses) -> HostError:
    return HostError(
        f"loss function: reported={sorted(own)} must be what it reported in the first step, "
        f"{sorted(expected)}, with as many values; let it report the same in every step"
    )


def _device() -> torch.device:
    return torch.device(torch.cuda.current_device())
