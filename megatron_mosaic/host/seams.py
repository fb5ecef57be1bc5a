"""Every place where Mosaic attaches to Megatron.

In order of preference: an argument or hook that Megatron offers, a subclass, a wrapper, a
replaced symbol. Replaced and wrapped symbols get their own back when the run or scope ends.
"""

import importlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from megatron_mosaic.errors import HostError


@dataclass(frozen=True, kw_only=True, slots=True)
class Seam:
    """One attachment.

    Args:
        symbol: ``module:attribute`` of the host.
        how: What is done with it.
        parameters: Parameters that it must have; they tell a usable version from another.
        since: First Megatron-Core version that has it in this form.
        hook: Attribute that the function asks for a stand-in where a fork has the patch of
            ``patches/``; then nothing is replaced.
        why: Why the host's own behaviour breaks a plan.
    """

    symbol: str
    how: Literal["argument", "subclass", "wrapped", "replaced", "set"]
    parameters: tuple[str, ...] = ()
    since: str = "0.19"
    hook: str = ""
    why: str

    def resolve(self) -> Any:
        """Finds the symbol.

        Raises:
            HostError: This Megatron lacks it, or it has other parameters.
        """
        module_name, _, path = self.symbol.partition(":")
        try:
            found: Any = importlib.import_module(module_name)
            for attribute in path.split("."):
                found = getattr(found, attribute)
        except (ImportError, AttributeError):
            raise HostError(
                f"megatron: symbol={self.symbol} must exist, as since {self.since}; "
                f"install megatron-core>=0.19.2,<0.21"
            ) from None
        if not self.parameters:
            return found
        missing = set(self.parameters) - set(inspect.signature(found).parameters)
        if missing:
            raise HostError(
                f"megatron: symbol={self.symbol} must take {sorted(missing)}, as since "
                f"{self.since}; install megatron-core>=0.19.2,<0.21"
            )
        return found

    def is_patched(self) -> bool:
        """Whether this Megatron asks for the hook itself, as a patched fork does."""
        if not self.hook:
            return False
        code = getattr(inspect.unwrap(self.resolve()), "__code__", None)
        return code is not None and self.hook in (*code.co_names, *code.co_consts)


SEAMS: tuple[Seam, ...] = (
    Seam(
        symbol="megatron.training.arguments:parse_and_validate_args",
        how="replaced",
        parameters=("extra_args_provider", "ignore_unknown_args", "args_defaults"),
        why="a script parses, validates and publishes its arguments in this one call; under a "
        "plan they must be validated for the language model's ranks",
    ),
    Seam(
        symbol="megatron.training:pretrain",
        how="replaced",
        parameters=("model_provider", "pg_collection", "skip_model_parallel_init", "store"),
        why="the script calls it without process groups; ours passes the plan's to the same "
        "function",
    ),
    Seam(
        symbol="megatron.training.training:get_forward_backward_func",
        how="replaced",
        parameters=("schedule_pg_collection",),
        hook="forward_backward_func",
        why="the loop offers no argument for a schedule of one's own",
    ),
    Seam(
        symbol="megatron.training.training:num_floating_point_operations",
        how="replaced",
        parameters=("args", "batch_size"),
        hook="num_floating_point_operations_func",
        why="it counts the language model at the encoder's sequence length and no encoder",
    ),
    Seam(
        symbol="megatron.training.training:training_log",
        how="replaced",
        parameters=("iteration", "is_first_iteration"),
        why="the loop offers no hook where it logs; ours calls it, then reports the modules to the "
        "same writers",
    ),
    Seam(
        symbol="megatron.training.checkpointing:maybe_save_dataloader_state",
        how="replaced",
        parameters=("train_iterator", "iteration", "dataloader_save_path"),
        hook="save_dataloader_state",
        why="it saves a loader from the first rank of the groups it is given, which are groups "
        "of one: every rank would write the same file",
    ),
    Seam(
        symbol="megatron.training.training:save_checkpoint",
        how="wrapped",
        parameters=("iteration", "model", "non_persistent_ckpt"),
        why="it writes over a checkpoint that stays marked as whole meanwhile",
    ),
    Seam(
        symbol="megatron.training.checkpointing:read_metadata",
        how="replaced",
        parameters=("tracker_filename",),
        why="it believes the tracker, also where that or the checkpoint it names is damaged; ours "
        "tells which one all ranks found whole",
    ),
    Seam(
        symbol="megatron.core.models.multimodal.llava_model:LLaVAModel.__init__",
        how="wrapped",
        parameters=("add_encoder", "add_decoder", "pg_collection", "vision_transformer_config"),
        why="scripts build both halves with one set of sizes; wrapped while a module is built",
    ),
    Seam(
        symbol="megatron.core.models.multimodal.llava_model:GPTModel",
        how="wrapped",
        parameters=("config", "transformer_layer_spec", "pg_collection"),
        why="LLaVAModel refuses sequence and context parallelism without TransformerEngine; "
        "wrapped while a language half is built on ranks with parts of sequences",
    ),
    Seam(
        symbol="megatron.core.models.multimodal.llava_model:LLaVAModel._preprocess_data",
        how="wrapped",
        parameters=("image_embeddings", "language_embeddings", "input_ids"),
        why="it merges whole sequences, of which a rank keeps a part; wrapped in such halves",
    ),
    Seam(
        symbol="megatron.core.models.multimodal.llava_model:"
        "LLaVAModel._process_embedding_token_parallel",
        how="wrapped",
        parameters=("combined_embeddings", "packed_seq_params"),
        why="it slices whole sequences; wrapped in the same halves",
    ),
    Seam(
        symbol="megatron.core.packed_seq_params:PackedSeqParams",
        how="subclass",
        parameters=("qkv_format", "cp_group"),
        why="masks and assignments of a microbatch must reach its layers, also where they compute "
        "again while other microbatches are under way",
    ),
    Seam(
        symbol="megatron.core.transformer.attention:SelfAttentionSubmodules",
        how="argument",
        parameters=("core_attention",),
        why="upstream's core attention knows causal masks, and zigzag parts of sequences",
    ),
    Seam(
        symbol="megatron.core.models.common.embeddings.rotary_pos_embedding:"
        "RotaryEmbedding.get_rotary_seq_len",
        how="wrapped",
        parameters=("packed_seq_params",),
        why="it gives consecutive positions to all samples; wrapped in language halves whose "
        "ranks have the tokens that their masks ask for",
    ),
    Seam(
        symbol="megatron.core.models.vision.clip_vit_model:CLIPViTModel.forward",
        how="wrapped",
        parameters=("x",),
        why="it knows one pipeline stage; wrapped in later stages of an encoder",
    ),
    Seam(
        symbol="megatron.core.transformer.transformer_block:TransformerBlock",
        how="wrapped",
        why="its checkpointed layers get no gradient where their input needs none; a forward "
        "pre-hook on each block that recomputes marks the input",
    ),
    Seam(
        symbol="megatron.core.pipeline_parallel.schedules:deallocate_output_tensor",
        how="argument",
        parameters=("out", "deallocate_pipeline_outputs"),
        why="tasks let go of their output's values as upstream's schedules do",
    ),
    Seam(
        symbol="megatron.core.rerun_state_machine:RerunStateMachine.validate_result",
        how="wrapped",
        parameters=("result", "rejection_func", "message"),
        why="what it says of a loss or gradient that is not a number names rank and step, but not "
        "module and microbatch; wrapped on the run's one machine around each task",
    ),
    Seam(
        symbol="megatron.core.models.mimo.model.base:MimoModel.__init__",
        how="wrapped",
        parameters=("mimo_config", "cp_group", "tp_group"),
        why="it builds every module that its role names, and roles know contiguous ranks only; "
        "wrapped while a module is built",
    ),
    Seam(
        symbol="megatron.core.parallel_state:_TENSOR_MODEL_PARALLEL_GROUP",
        how="set",
        why="scripts and some layers read global groups; set around each module's tasks",
    ),
    Seam(
        symbol="megatron.core.models.mimo.model.base:MimoModel",
        how="subclass",
        why="get_megatron_optimizer routes this type to an optimizer per module",
    ),
    Seam(
        symbol="megatron.training.models.base:ModelBuilder",
        how="subclass",
        why="the loop's hook for building and wrapping the model",
    ),
    Seam(
        symbol="megatron.core.models.mimo.optimizer:get_mimo_optimizer",
        how="argument",
        parameters=("mimo_model", "config"),
        why="it reads ranks and groups from the model's module_to_grid_map, which is ours",
    ),
    Seam(
        symbol="megatron.core.models.mimo.optimizer:MimoOptimizer",
        how="replaced",
        parameters=("module_infos", "config"),
        why="it saves states under the modules' names, where a stock run does not look for them",
    ),
    Seam(
        symbol="megatron.core.pipeline_parallel.schedules:forward_step",
        how="argument",
        parameters=("cp_group_size", "is_last_stage", "current_microbatch"),
        why="tasks call it with their module's values, not the global ones",
    ),
    Seam(
        symbol="megatron.core.transformer.moe.moe_logging:get_moe_metrics_tracker",
        how="set",
        why="the loop reduces routers' losses over one collection of a rank and prints them where "
        "there may be no router; made global before",
    ),
    Seam(
        symbol="megatron.core.parallel_state:_GLOBAL_MEMORY_BUFFER",
        how="set",
        why="tensor-parallel layers write into it, all of a process into the same; set around the "
        "tasks of modules that run at the same time",
    ),
    Seam(
        symbol="megatron.core.distributed:DistributedDataParallel._make_backward_post_hook",
        how="argument",
        parameters=("param",),
        why="the nodes that accumulate gradients keep the stream on which DDP is built, one of "
        "Megatron's own; made anew in the lane of a module",
    ),
    Seam(
        symbol="megatron.core.transformer.moe.experts:SequentialMLP",
        how="argument",
        parameters=("num_local_experts", "pg_collection"),
        why="it tells which of all experts a rank has, by its ep_group and num_local_experts",
    ),
)


def check_seams() -> None:
    """Checks that this Megatron has everything that Mosaic attaches to.

    Symbols to be replaced are checked when they are, for afterwards they are ours.

    Raises:
        HostError: Something is missing; the message names it.
    """
    for seam in SEAMS:
        if seam.how != "replaced":
            seam.resolve()


def unpatched(replacements: Mapping[str, Any]) -> dict[str, Any]:
    """Keeps those that this Megatron has no hook for."""
    patched = {seam.symbol for seam in SEAMS if seam.symbol in replacements and seam.is_patched()}
    return {symbol: value for symbol, value in replacements.items() if symbol not in patched}


@contextmanager
def replaced(replacements: Mapping[str, Any]) -> Iterator[None]:
    """Replaces symbols, given as ``module:attribute`` of a row, until the scope ends."""
    rows = {seam.symbol: seam for seam in SEAMS}
    originals = {symbol: rows[symbol].resolve() for symbol in replacements}
    try:
        for symbol, replacement in replacements.items():
            _set(symbol, replacement)
        yield
    finally:
        for symbol, original in originals.items():
            _set(symbol, original)


def _set(symbol: str, value: object) -> None:
    module_name, _, attribute = symbol.partition(":")
    setattr(importlib.import_module(module_name), attribute, value)
