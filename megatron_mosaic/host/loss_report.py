"""Makes the losses that modules report global: every rank reports the same."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_mosaic.errors import HostError
from megatron_mosaic.host.agreement import raise_together

# Of each module that this rank reports of, an entry for each microbatch.
Reports = Mapping[str, Sequence[Mapping[str, torch.Tensor]]]


class _Loss(NamedTuple):
    """A loss by the name that the script gives it: which module has it, and how many values."""

    key: str
    module: str
    size: int


class LossReport:
    """Sums the losses and token counts of all ranks, so that every rank reports the same.

    The stock loop logs on the last rank of the world, whichever module that is.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._host_group = group
        # By whether it is a step of evaluation: scripts report more there.
        self._losses: dict[bool, list[_Loss]] = {}
        self._changed: HostError | None = None
        self._num_changed: torch.Tensor | None = None

    def reduce(
        self, losses: Reports, *, num_tokens: Any, replicas: int, forward_only: bool
    ) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
        """Makes this step's losses global.

        Args:
            losses: What this rank reports.
            num_tokens: Tokens that count in the loss of this rank; 0 where it does not report.
            replicas: Ranks that report.
            forward_only: Whether the step evaluates.

        Returns:
            One entry with the same keys, on every rank: sums of loss and tokens where the loss
            function gives both, else the mean. And the tokens of the whole batch.

        Raises:
            HostError: Two modules report a loss of the same name.

        Note:
            Collective over the world. Whether the losses are sound, ``check`` says.
        """
        every = self._agreed(losses, forward_only=forward_only)
        self._changed = changed = _changed(losses, every)
        parts = [
            torch.as_tensor(num_tokens, device=_device()).reshape(1).double(),
            torch.tensor([changed is not None], dtype=torch.float64, device=_device()),
        ]
        for loss in every:
            entries = [] if changed else [entry[loss.key] for entry in losses.get(loss.module, ())]
            parts.append(_total(entries, size=loss.size, replicas=replicas))
        total = torch.cat(parts)
        dist.all_reduce(total)
        self._num_changed = total[1]
        values = total[2:].float().split([loss.size for loss in every])
        report = {loss.key: value for loss, value in zip(every, values, strict=True)}
        return ([report] if report else []), total[0].float()

    def check(self) -> None:
        """Makes sure that the loss functions of all ranks reported what they used to report.

        It waits for the device, so it is for the end of a step, when all its work is issued.

        Raises:
            RankError: A loss function changed what it reports.

        Note:
            Collective over the world, once after each ``reduce``.
        """
        if self._num_changed is not None and self._num_changed > 0:
            raise_together(self._changed, group=self._host_group)

    def _agreed(self, losses: Reports, *, forward_only: bool) -> list[_Loss]:
        """Agrees on the losses, once: ranks without one do not know them."""
        if forward_only not in self._losses:
            own = [loss for name, entries in losses.items() for loss in _named(name, entries[:1])]
            every: list[list[_Loss]] = [[]] * dist.get_world_size()
            dist.all_gather_object(every, own, group=self._host_group)
            agreed: dict[str, _Loss] = {}
            for loss in (each for found in every for each in found):
                first = agreed.setdefault(loss.key, loss)
                if first.module != loss.module:
                    raise HostError(
                        f"loss function: reported={loss.key} of {loss.module} must have another "
                        f"name than that of {first.module}; report each module's loss under its "
                        f"own name"
                    )
            self._losses[forward_only] = list(agreed.values())
        return self._losses[forward_only]


def _named(module: str, entries: Sequence[Mapping[str, torch.Tensor]]) -> list[_Loss]:
    return [_Loss(key, module, value.numel()) for entry in entries for key, value in entry.items()]


def _changed(losses: Reports, every: Sequence[_Loss]) -> HostError | None:
    """Returns what is wrong if a microbatch's report is not as agreed."""
    for name, entries in losses.items():
        expected = sorted(loss for loss in every if loss.module == name)
        for entry in entries:
            if sorted(_named(name, [entry])) != expected:
                return HostError(
                    f"loss function: reported={sorted(entry)} must be what it reported in the "
                    f"first step, {[loss.key for loss in expected]}, with as many values; let it "
                    f"report the same for every microbatch"
                )
    return None


def _total(entries: Sequence[torch.Tensor], *, size: int, replicas: int) -> torch.Tensor:
    """Sums loss and tokens over this rank's microbatches, or takes its part of a mean."""
    if not entries:
        return torch.zeros(size, dtype=torch.float64, device=_device())
    values = torch.stack([entry.detach().reshape(-1).double() for entry in entries])
    return values.sum(dim=0) if size == 2 else values.mean(dim=0) / replicas


def _device() -> torch.device:
    return torch.device(torch.cuda.current_device())
