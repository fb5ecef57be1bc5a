"""Megatron's arguments under a plan."""

import argparse
import os
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from megatron.training import arguments as stock
from megatron.training.arguments import parse_and_validate_args as stock_parse_and_validate_args
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.global_vars import set_global_variables
from megatron.training.utils import print_rank_0

from megatron_mosaic.engine.lost import Limits
from megatron_mosaic.errors import HostError, LayoutError, PlanError
from megatron_mosaic.host.agreement import stop
from megatron_mosaic.host.meeting import meet
from megatron_mosaic.host.recompute import check_recompute
from megatron_mosaic.host.sharing import check_sharing
from megatron_mosaic.layout.model_facts import ModuleFacts, check_module
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.sharing.choose import MODES

# A run in which every second task takes this long is as good as lost; and the ranks end within a
# minute: this, two heartbeats, and the time to say so.
_TASK_TIMEOUT_S = 45.0

# Options that cannot work under a plan: attribute, what it must be, why.
REFUSED: tuple[tuple[str, Any, str], ...] = (
    ("fp16", False, "modules would need one loss scaler; use --bf16 or fp32"),
    ("virtual_pipeline_model_parallel_size", None, "the plan says it for each module"),
    ("num_virtual_stages_per_pipeline_rank", None, "the plan says it for each module"),
    ("num_layers_per_virtual_pipeline_stage", None, "the plan says layers_per_stage"),
    ("pipeline_model_parallel_layout", None, "the plan says layers_per_stage"),
    ("decoder_first_pipeline_num_layers", None, "the plan says layers_per_stage"),
    ("decoder_last_pipeline_num_layers", None, "the plan says layers_per_stage"),
    ("moe_use_upcycling", False, "Megatron would build the dense model without the plan"),
    ("overlap_moe_expert_parallel_comm", False, "the engine runs each task whole"),
    ("rampup_batch_size", None, "a plan has one global_batch_size"),
    ("train_sync_interval", None, "the stock loop would wait on groups of one module"),
    ("use_megatron_fsdp", False, "a plan shards with DDP and the distributed optimizer"),
    ("use_torch_fsdp2", False, "a plan shards with DDP and the distributed optimizer"),
    ("num_distributed_optimizer_instances", 1, "MimoOptimizer knows one instance"),
    ("overlap_param_gather_with_optimizer_step", False, "the engine starts the gathers"),
    ("te_rng_tracker", False, "each module has a tracker state of its own"),
    ("cuda_graph_impl", "none", "the engine's tasks are not captured yet"),
    ("optimizer_cuda_graph", False, "the engine's tasks are not captured yet"),
    ("log_params_norm", False, "Megatron reads global groups for it"),
    ("check_weight_hash_across_dp_replicas_interval", None, "Megatron reads global groups for it"),
    ("iterations_to_skip", [], "Megatron reads global groups for it"),
    ("full_validation", False, "Megatron reads global groups for it"),
    ("save_wgrads_interval", None, "Megatron reads global groups for it"),
    ("save_params_interval", None, "Megatron reads global groups for it"),
    ("freeze_all_layers", False, "the plan says trainable for each module"),
    ("decoupled_lr", None, "Megatron drops per-parameter overrides of several modules"),
    ("use_mup", False, "Megatron drops per-parameter overrides of several modules"),
    ("perform_rl_step", False, "a plan trains on data sets"),
    ("use_tp_pp_dp_mapping", False, "the plan lists the ranks in tp-cp-dp-pp order"),
)


def parse_and_validate_args(
    extra_args_provider: Callable[..., Any] | None = None,
    ignore_unknown_args: bool = False,
    args_defaults: Mapping[str, Any] | None = None,
) -> argparse.Namespace:
    """Parses a script's arguments, and makes them those of the plan if one is given.

    Stands where a script calls Megatron's function of the same name. Without
    ``--mosaic-plan`` it is that function.

    Raises:
        SystemExit: Code 2, on every rank: plan, arguments or launch contradict each other.

    Note:
        With a plan, all ranks must call it: they compare their plans.
    """
    defaults = dict(args_defaults or {})
    provider = _with_mosaic_arguments(extra_args_provider)
    known = stock.parse_args(provider, ignore_unknown_args)
    if known.mosaic_plan is None:
        return stock_parse_and_validate_args(provider, ignore_unknown_args, defaults)
    known.mosaic_meeting = meet(known.mosaic_plan)
    plan = known.mosaic_meeting.plan
    try:
        _apply_plan(known, plan)
        check_module(plan.language, _facts(known))
        _validate(known, plan, defaults)
    except (PlanError, LayoutError, HostError) as error:
        # Alike on all ranks: they have the same plan and the same arguments.
        stop(str(error) if known.rank == 0 else None)
    set_global_variables(known)
    return known


def _with_mosaic_arguments(provider: Callable[..., Any] | None) -> Callable[..., Any]:
    def add(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = provider(parser) if provider is not None else parser
        group = parser.add_argument_group(title="mosaic")
        group.add_argument(
            "--mosaic-plan",
            default=None,
            help="plan file: a layout per module; {world_size} in its name stands for the ranks of "
            "the run, so that an elastic launch finds the plan for the nodes that are left",
        )
        group.add_argument(
            "--mosaic-trace", default=None, help="write when each task ran into this folder"
        )
        group.add_argument(
            "--mosaic-sharing",
            default="auto",
            metavar="{" + ",".join(MODES) + "}",
            help="how modules that run at the same time share a GPU: green, contexts with the "
            "plan's quotas of SMs; priority or streams, without quotas; serial, not at all; "
            "strict, green or the run stops; auto (the default), the first of green, priority "
            "and serial that there is, with a line in the log",
        )
        group.add_argument(
            "--mosaic-task-timeout-s",
            type=float,
            default=None,
            help="end the run when a rank, waiting for no other, stays in a task for longer than "
            "its longest task of the step before and so many seconds more (by default "
            f"{_TASK_TIMEOUT_S:g}, and in the first step --distributed-timeout-minutes)",
        )
        group.add_argument(
            "--mosaic-heartbeat-timeout-s",
            type=float,
            default=30.0,
            help="end the run when a rank has given no sign of life for so long; raise it where a "
            "call into C holds the interpreter for longer",
        )
        group.add_argument(
            "--mosaic-max-unreadable-samples",
            type=int,
            default=0,
            metavar="N",
            help="samples of a data set that each rank may pass over because they cannot be read; "
            "the next one stands in their place, and each is said. By default the first one ends "
            "the run. Loaders, such as Energon's, have ways of their own",
        )
        return parser

    return add


def _apply_plan(args: argparse.Namespace, plan: Plan) -> None:
    """Sets what the plan decides; refuses what contradicts it or cannot work."""
    args.mosaic_plan_digest = plan.digest()
    _decide_sizes(args, plan)
    check_recompute(args, plan)
    for name, allowed, why in REFUSED:
        value = getattr(args, name, allowed)
        if value != allowed:
            raise HostError(
                f"arguments: {name}={value} must be {allowed} under a plan, since {why}; "
                f"remove the option"
            )
    if args.dataloader_type not in (None, "single", "external"):
        raise HostError(
            f"arguments: dataloader_type={args.dataloader_type} must be single or external under a "
            f"plan, which hands every module its own samples; shuffle in the data set"
        )
    _check_timeouts(args)
    check_sharing(args, plan)
    _check_saving(args, plan)
    # Only this format can be read under another layout than it was written.
    args.ckpt_format = "torch_dist"
    args.dist_ckpt_optim_fully_reshardable = True


def limits_of(args: argparse.Namespace) -> Limits:
    """How long the ranks wait for a rank that gives no sign of life or stays in a task."""
    heartbeat_s = args.mosaic_heartbeat_timeout_s
    return Limits(
        task_s=args.mosaic_task_timeout_s,
        default_task_s=_TASK_TIMEOUT_S,
        heartbeat_s=heartbeat_s,
        # Megatron gives up a collective after this time, compilation or not.
        start_s=max(60.0 * args.distributed_timeout_minutes, heartbeat_s),
        interval_s=min(heartbeat_s / 10, 1.0),
    )


def _check_timeouts(args: argparse.Namespace) -> None:
    for name in ("mosaic_task_timeout_s", "mosaic_heartbeat_timeout_s"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise HostError(f"arguments: {name}={value:g} must be above 0; give seconds")


def _decide_sizes(args: argparse.Namespace, plan: Plan) -> None:
    language = plan.language
    _decide(args, "tensor_model_parallel_size", language.tensor_model_parallel_size, unset=1)
    _decide(args, "pipeline_model_parallel_size", language.pipeline_model_parallel_size, unset=1)
    _decide(args, "context_parallel_size", language.context_parallel_size, unset=1)
    _decide(args, "sequence_parallel", language.sequence_parallel, unset=False)
    expert = language.expert_shape
    _decide(args, "expert_model_parallel_size", expert.ep, unset=1)
    _decide(args, "expert_tensor_parallel_size", expert.expt_tp, unset=None)
    _decide(args, "micro_batch_size", plan.micro_batch_size, unset=None)
    _decide(args, "global_batch_size", plan.global_batch_size, unset=None)


def _check_saving(args: argparse.Namespace, plan: Plan) -> None:
    """Megatron's fp32 optimizer leaves its parameter groups to what rank 0 writes for all."""
    rank_0_knows_all = list(plan.modules_of(0)) == list(plan.modules)
    if args.save and not (args.bf16 or args.use_distributed_optimizer or rank_0_knows_all):
        raise HostError(
            f"arguments: save={args.save} must go with --use-distributed-optimizer in fp32 where "
            f"rank 0 does not host every module, for Megatron would save rank 0's optimizer only; "
            f"add --use-distributed-optimizer"
        )


def _decide(args: argparse.Namespace, name: str, planned: Any, *, unset: Any) -> None:
    given = getattr(args, name)
    if given not in (unset, planned):
        raise PlanError(
            f"arguments: {name}={given} must equal {planned}, as in the plan; "
            f"remove the option or change the plan"
        )
    setattr(args, name, planned)


def _validate(args: argparse.Namespace, plan: Plan, defaults: dict[str, Any]) -> None:
    """Lets Megatron validate the language model's arguments.

    It derives the data-parallel size, and from it the number of microbatches, from the size of
    the world: for that it must see the language model's ranks only.
    """
    if args.use_checkpoint_args or defaults.get("use_checkpoint_args", False):
        load_args_from_checkpoint(args)
    world_size, args.world_size = args.world_size, len(plan.language.ranks)
    rank, args.rank = args.rank, min(args.rank, len(plan.language.ranks) - 1)
    try:
        stock.validate_args(args, defaults)
    except AssertionError as error:
        raise HostError(f"arguments: {_reason(error)}; change the option") from error
    finally:
        args.world_size, args.rank = world_size, rank
    if args.eval_micro_batch_size != args.micro_batch_size:
        raise HostError(
            f"arguments: eval_micro_batch_size={args.eval_micro_batch_size} must equal "
            f"micro_batch_size={args.micro_batch_size} under a plan; remove the option"
        )


def _reason(error: AssertionError) -> str:
    """Megatron's words on one line, or the condition itself where it has none."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return " ".join(str(error).split()) or f"Megatron must find that {frame.line}"


def _facts(args: argparse.Namespace) -> ModuleFacts:
    """Sizes of the language model; those of the others show when the script builds them."""
    for name in ("num_attention_heads", "hidden_size"):
        if getattr(args, name) is None:
            raise HostError(f"arguments: {name}=None must be given; add --{name.replace('_', '-')}")
    num_layers = args.decoder_num_layers or args.encoder_num_layers or args.num_layers
    if num_layers is None:
        raise HostError("arguments: num_layers=None must be given; add --num-layers")
    ffn_hidden_size = args.ffn_hidden_size or 4 * args.hidden_size
    return ModuleFacts(
        num_layers=num_layers,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=(
            args.num_query_groups if args.group_query_attention else args.num_attention_heads
        ),
        hidden_size=args.hidden_size,
        ffn_hidden_size=ffn_hidden_size,
        num_experts=args.num_experts,
        moe_ffn_hidden_size=(args.moe_ffn_hidden_size or ffn_hidden_size)
        if args.num_experts
        else None,
    )


def log_choices(args: argparse.Namespace, plan: Plan) -> None:
    """Says once, on rank 0, what a plan decided beside the user's own words."""
    print_rank_0(f"mosaic: plan {plan.digest()[:12]}, checkpoints in format {args.ckpt_format}")
    if os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1" and args.tensor_model_parallel_size > 1:
        print_rank_0("mosaic: CUDA_DEVICE_MAX_CONNECTIONS=1 serialises the modules' streams")
