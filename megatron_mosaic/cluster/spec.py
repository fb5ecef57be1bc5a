"""On what a model is trained: GPUs, and links in tiers."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_mosaic.model.spec import Precision


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """Share of a peak rate that operations reach, by their size.

    ``share = peak_share * size / (size + half_size)``: small operations are dominated by what
    every one costs, large ones come close to ``peak_share``. A multiplication with one small size
    does not fill its tiles, nor amortise its operands: another factor of the same form.

    Args:
        peak_share: Limit for large operations, of the rate that the GPU's data sheet states.
        half_size: FLOPs or bytes of an operation that reaches half of it.
        half_dim: Smallest size of a multiplication that reaches half of it.
        source: Where the two numbers are from.
    """

    peak_share: float
    half_size: float = 0.0
    half_dim: float = 0.0
    source: str = ""

    def share(self, size: float, *, smallest: float = 0.0) -> float:
        """Share for an operation of a size; 0 for none.

        Args:
            size: FLOPs or bytes.
            smallest: Smallest size of a multiplication; 0 is large enough.
        """
        if not size:
            return 0.0
        narrow = smallest / (smallest + self.half_dim) if smallest else 1.0
        return self.peak_share * narrow * size / (size + self.half_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class SharingCurves:
    """How fast operations are on some of a GPU's multiprocessors, and beside those of others.

    Args:
        bandwidth_knee: Share of the multiprocessors that draws all of the memory's bandwidth.
        interference: Time that an operation loses, over its own, which only waits for memory
            beside others that take all of the bandwidth: caches and queues are theirs too.
        rates: Measured rates over that of the whole GPU, by kind of operation and number of
            multiprocessors, ascending. A kind is a curve's name, or the beginning of some:
            ``matmul`` is ``matmul.bf16`` and ``matmul.fp8``. Where it is there it counts, and
            not the knee.
        source: Where the numbers are from.
    """

    bandwidth_knee: float
    interference: float
    rates: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU.

    Args:
        name: Such as ``"H100"``.
        memory_bytes: All its memory as the driver reports it. What the CUDA context and libraries
            such as NCCL take is in it; plans leave that free (``Problem.reserved_bytes``).
        matmul_flops_per_s: Dense peak by precision, without sparsity.
        memory_bytes_per_s: Peak of its memory.
        num_sms: Streaming multiprocessors.
        curves: Reached shares by operation, such as ``matmul.bf16``, ``attention.forward`` or
            ``elementwise``.
        host_operation_s: Time in which the host launches one multiplication or attention and what
            goes with it, in each pass, where no CUDA graph does.
        host_expert_s: Time that a layer waits in each pass for the host to launch the kernels
            of one expert once it knows the sizes, by precision (``bf16``, ``fp8``).
        overlap_cost: Time that computation loses for each second of communication it hides: both
            share multiprocessors and memory.
        compute_capability: Major and minor number; None is not known, or not CUDA.
        sharing: What operations of several modules make of each other; None is not known.
        sources: Where the other numbers are from, by field; ``all`` is every one.
    """

    name: str
    memory_bytes: float
    matmul_flops_per_s: Mapping[str, float]
    memory_bytes_per_s: float
    num_sms: int
    curves: Mapping[str, Curve]
    host_operation_s: float = 0.0
    host_expert_s: Mapping[str, float] = field(default_factory=dict)
    overlap_cost: float = 0.0
    compute_capability: tuple[int, int] | None = None
    sharing: SharingCurves | None = None
    sources: Mapping[str, str] = field(default_factory=dict)

    def peak_flops_per_s(self, precision: Precision) -> float:
        """Peak of a precision, or of bf16 where the GPU has no faster way."""
        return self.matmul_flops_per_s.get(precision, self.matmul_flops_per_s["bf16"])


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkTier:
    """Links that join GPUs up to some number.

    Args:
        name: Such as ``"NVLink"``.
        span: GPUs, next to each other, that these links join; ``None`` is all of the cluster.
        bandwidth_bytes_per_s: Of one GPU in one direction.
        latency_s: Of one message.
        curve: Share of the bandwidth that messages reach, by their bytes.
        source: Where the bandwidth and the latency are from.
    """

    name: str
    span: int | None
    bandwidth_bytes_per_s: float
    latency_s: float
    curve: Curve
    source: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Equal nodes of equal GPUs.

    Args:
        name: For people.
        gpu: Every GPU.
        gpus_per_node: GPUs of a node.
        num_nodes: Nodes.
        tiers: Fastest first, spans ascending, the last one spans everything.
    """

    name: str
    gpu: Gpu
    gpus_per_node: int
    num_nodes: int
    tiers: tuple[LinkTier, ...]

    @property
    def num_gpus(self) -> int:
        """All GPUs."""
        return self.gpus_per_node * self.num_nodes

    def tier(self, span: int) -> LinkTier:
        """Slowest links inside a block of ``span`` GPUs that begins where a tier's blocks do."""
        return next(tier for tier in self.tiers if tier.span is None or span <= tier.span)
