"""How a module is split, without saying on which ranks: what its costs depend on."""

from dataclasses import dataclass
from typing import Literal, Self

from megatron_mosaic.layout.attention import KeyExchange
from megatron_mosaic.layout.placement import ItemOrder, ModulePlacement, Recompute
from megatron_mosaic.tokens.names import Method


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelSizes:
    """Parallel sizes of one module.

    Args:
        tp: Tensor-parallel size.
        cp: Context-parallel size.
        dp: Data-parallel size.
        pp: Pipeline-parallel size.
        ep: Parts into which the list of experts is split.
        etp: Ranks that split each expert.
        sequence_parallel: Whether tensor-parallel ranks split the sequence between them.
        recompute: Activations that the backward pass computes again.
        chunks: Virtual stages of each rank; 1 is no interleaving.
        tokens: How tokens are assigned to context-parallel ranks under a multimodal mask.
        keys: How keys reach the ranks whose queries see them, there.
        items: Which replica of an encoder runs which items of a task.
    """

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    sequence_parallel: bool = False
    recompute: Recompute | None = None
    chunks: int = 1
    tokens: Method = "balanced"
    keys: KeyExchange = "auto"
    items: ItemOrder = "in_order"

    @classmethod
    def of(cls, placement: ModulePlacement) -> Self:
        """Sizes of a placement."""
        shape, experts = placement.shape, placement.expert_shape
        attention = placement.attention
        return cls(
            tp=shape.tp,
            cp=shape.cp,
            dp=shape.dp,
            pp=shape.pp,
            ep=experts.ep,
            etp=experts.expt_tp,
            sequence_parallel=placement.sequence_parallel,
            recompute=placement.recompute,
            tokens=attention.tokens if attention else "balanced",
            keys=attention.keys if attention else "auto",
            items=placement.items,
        )

    @property
    def num_ranks(self) -> int:
        """Ranks that host the module."""
        return self.tp * self.cp * self.dp * self.pp

    @property
    def expert_dp(self) -> int:
        """Replicas of each expert in a stage."""
        return self.tp * self.cp * self.dp // (self.etp * self.ep)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSettings:
    """What a run does the same for all modules, as Megatron's arguments say it.

    Args:
        distributed_optimizer: Splits the optimizer's state over data-parallel replicas.
        overlap_grad_reduce: Reduces gradients while the backward pass goes on.
        overlap_param_gather: Gathers parameters while the forward pass goes on.
        tp_comm_overlap: Overlaps tensor-parallel collectives with multiplications.
        fsdp: Splits weights and gradients over replicas, too (Megatron-FSDP, ZeRO-3).
        gradient_bytes: Bytes of an accumulated gradient.
        flash_attention: Attention never writes its scores to memory.
        fp8_attention: Attention multiplies in fp8 where layers do.
        fp8_output: So do the logits.
        dropout: Dropout after attention and MLP, and on attention scores that are written.
        cross_entropy_fusion: One kernel for the loss instead of a pass for each of its steps.
        cp_comm: How context-parallel ranks meet each other's keys: around a ring while they
            compute, or by an all-to-all that swaps sequence for heads before and after.
        moe_dispatcher: ``alltoall`` sends a copy of a token for each of its experts, ``flex``
            (DeepEP, HybridEP) one for each rank that has some of them.
        moe_overlap: Tokens travel to experts while another microbatch computes.
        overlap_p2p: Interleaved pipelines send while they compute.
        split_hops: Tensor-parallel ranks without sequence parallelism send a part of the tokens
            each to the next stage (arXiv 2104.04473, section 4.1).
        cuda_graph: How much of a layer of experts is launched as a graph: nothing, all but the
            experts, or the whole iteration, which also needs no sizes on the host.
    """

    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    tp_comm_overlap: bool = False
    fsdp: bool = False
    gradient_bytes: int = 4
    flash_attention: bool = True
    fp8_attention: bool = False
    fp8_output: bool = False
    dropout: bool = False
    cross_entropy_fusion: bool = True
    cp_comm: Literal["p2p", "a2a"] = "p2p"
    moe_dispatcher: Literal["alltoall", "flex"] = "alltoall"
    moe_overlap: bool = False
    overlap_p2p: bool = True
    split_hops: bool = False
    cuda_graph: Literal["none", "partial", "full"] = "none"
