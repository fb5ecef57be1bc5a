"""What is measured, as data that passes from the ranks to whoever writes the file."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

Collective = Literal["all-reduce", "all-gather", "all-to-all", "send"]
Reach = Literal["near", "far"]
"""Links inside a node, or between nodes."""


class TimedOperation(NamedTuple):
    """One operation of one size.

    Args:
        curve: Name of its efficiency curve, such as ``matmul.bf16`` or ``elementwise``.
        size: FLOPs, or bytes moved where memory bounds it.
        seconds: Median of several runs.
        smallest: Smallest size of a multiplication; 0 if it is none.
    """

    curve: str
    size: float
    seconds: float
    smallest: float = 0.0


class TimedMessage(NamedTuple):
    """One collective of one size.

    Args:
        reach: Over which links.
        collective: Which.
        steps: Messages that follow one another, each of which costs a latency.
        moved_bytes: What one rank sends in all.
        seconds: Median of several runs, on the slowest rank.
    """

    reach: Reach
    collective: Collective
    steps: int
    moved_bytes: float
    seconds: float


class TimedPasses(NamedTuple):
    """Seconds of a layer: of its forward pass, and of both together."""

    forward_s: float
    both_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """The device of one rank.

    Args:
        kind: Torch's word for it.
        name: As the vendor calls it.
        memory_bytes: All its memory, with what the CUDA context takes; a rank's part on CPU.
        num_sms: Streaming multiprocessors, or cores.
        software: What it was measured with: versions of torch, the driver and the like.
        compute_capability: Major and minor number of a GPU.
    """

    kind: Literal["cpu", "cuda"]
    name: str
    memory_bytes: float
    num_sms: int
    software: Mapping[str, str]
    compute_capability: tuple[int, int] | None = None

    def describe(self) -> str:
        """One line for the source of a number."""
        return ", ".join([self.name, *(f"{key} {it}" for key, it in self.software.items())])


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurements:
    """All that was measured.

    Args:
        device: Where.
        operations: Of one rank, while the others ran the same.
        messages: Between the ranks; none if there is one.
        ranks_per_node: Ranks of a node.
        num_nodes: Nodes.
        quick: Whether a few small sizes were measured.
        layer: A whole layer, which the fitted operations should add up to.
    """

    device: Device
    operations: tuple[TimedOperation, ...]
    messages: tuple[TimedMessage, ...]
    ranks_per_node: int
    num_nodes: int
    quick: bool
    layer: TimedPasses
