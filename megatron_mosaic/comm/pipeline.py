"""Passes activations and gradients between neighbouring pipeline stages of one module."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_mosaic.comm.groups import wire_of

Shape = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineLink:
    """One direction between two ranks of neighbouring stages, or inside a rank that hosts both.

    Args:
        group: A group that holds both ranks, warmed up, used for this link and direction only.
            On a group that several links share, a receive posted early would hold back every
            later send: NCCL completes what a communicator is given in order.
        source: Global rank that sends.
        destination: Global rank that receives.
        dtype: Type of the tensors.
        device: Where the tensors come from and go to.
    """

    group: dist.ProcessGroup
    source: int
    destination: int
    dtype: torch.dtype
    device: torch.device

    def post(self, tensor: torch.Tensor | None, *, shape: Shape) -> "PendingTensor":
        """Issues the send or the receive of this rank, and waits for nothing.

        A tensor without elements does not travel: both ends know that from its shape.

        Args:
            shape: Shape of the tensor, such as ``(s, b, h)``; the same on both ranks.
            tensor: What the source sends, which must not change until the transfer is finished;
                None at the destination.
        """
        wire = wire_of(self.group, device=self.device)
        if 0 in shape:
            message = torch.empty(shape, dtype=self.dtype, device=wire)
            return PendingTensor(message=message, device=self.device, works=())
        if dist.get_rank() == self.source:
            assert tensor is not None, f"rank {self.source} has nothing to send"
            assert tensor.shape == shape, f"{tuple(tensor.shape)} is not the promised {shape}"
            assert tensor.dtype == self.dtype, f"{tensor.dtype} on a link of {self.dtype}"
            if self.source == self.destination:
                return PendingTensor(message=tensor.detach(), device=self.device, works=())
            message = tensor.detach().contiguous().to(wire)
            operation = dist.P2POp(dist.isend, message, self.destination, group=self.group)
        else:
            message = torch.empty(shape, dtype=self.dtype, device=wire)
            operation = dist.P2POp(dist.irecv, message, self.source, group=self.group)
        # A batch of one runs on the group's own communicator; NCCL opens another one for each
        # pair of ranks that sends without a batch.
        works = dist.batch_isend_irecv([operation])
        return PendingTensor(message=message, device=self.device, works=works)


@dataclass(kw_only=True, slots=True)
class PendingTensor:
    """A tensor on its way. It keeps the buffer alive until it has arrived or left.

    Note:
        On CUDA the buffer belongs to the stream on which it was posted. Whoever waits on another
        one records it with ``buffers`` before the wait lets go of them.
    """

    message: torch.Tensor | None
    device: torch.device
    works: Sequence[dist.Work]

    def wait(self) -> torch.Tensor:
        """Blocks until the tensor has arrived, and hands it over: call it once."""
        message = self.message
        assert message is not None, "this tensor was handed over already"
        self.finish()
        return message.to(self.device)

    def buffers(self) -> Sequence[torch.Tensor]:
        """Returns what leaves or arrives."""
        return () if self.message is None else (self.message,)

    def is_done(self) -> bool:
        """Tells, without waiting, whether nothing is under way any more."""
        return all(work.is_completed() for work in self.works)

    def finish(self) -> None:
        """Blocks until the buffer is free."""
        for work in self.works:
            work.wait()
        self.works = ()
        self.message = None


class PipelineChannel:
    """A link as the engine sees it: a hidden state ``[s, b, h]`` for each microbatch.

    Args:
        link: The link.
        shape_of: Shape of a microbatch's hidden state.
    """

    def __init__(self, link: PipelineLink, *, shape_of: Callable[[int], Shape]) -> None:
        self._link = link
        self._shape_of = shape_of

    def split(
        self, leaving: torch.Tensor | None, microbatches: Sequence[int]
    ) -> Sequence[torch.Tensor | None]:
        """Cuts the hidden state of one task into those of its microbatches."""
        if leaving is None or len(microbatches) == 1:
            return [leaving] * len(microbatches)
        return leaving.split([self._shape_of(m)[1] for m in microbatches], dim=1)

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Puts the hidden states of a task's microbatches together."""
        return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)

    def post(self, microbatch: int, leaving: torch.Tensor | None) -> PendingTensor:
        """Issues this rank's send or receive of one microbatch."""
        return self._link.post(leaving, shape=self._shape_of(microbatch))
