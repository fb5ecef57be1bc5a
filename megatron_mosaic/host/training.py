"""Megatron's ``pretrain`` under a plan."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import MultiModuleProcessGroupCollection
from megatron.training import pretrain as stock_pretrain
from megatron.training.checkpointing import save_checkpoint as stock_save_checkpoint
from megatron.training.global_vars import get_args

from megatron_mosaic.comm.groups import GroupFactory, nodes_of_ranks
from megatron_mosaic.engine.progress import Progress
from megatron_mosaic.engine.trace import (
    Clock,
    DeviceClock,
    HostClock,
    TaskRecorder,
    TaskTrace,
    remove_former_ranks,
)
from megatron_mosaic.errors import HostError, LayoutError, PlanError
from megatron_mosaic.host.agreement import RankError, stop
from megatron_mosaic.host.arguments import limits_of, log_choices
from megatron_mosaic.host.channels import ChannelSet
from megatron_mosaic.host.checkpoint import prepare_loading, tracker_reader
from megatron_mosaic.host.data.position import save_loader_states
from megatron_mosaic.host.data.provider import DatasetProvider, ReadingByModule
from megatron_mosaic.host.faults.record_file import RecordFile
from megatron_mosaic.host.faults.watch import Watch
from megatron_mosaic.host.forward_backward import PlanForwardBackward
from megatron_mosaic.host.groups import lone_collection, module_groups
from megatron_mosaic.host.meeting import Meeting
from megatron_mosaic.host.model import MosaicModelConfig
from megatron_mosaic.host.optimizer_state import LayoutFreeOptimizer
from megatron_mosaic.host.reports import StepFlops
from megatron_mosaic.host.runtime import Runtime
from megatron_mosaic.host.saving import explained_failures, unmark_before_saving
from megatron_mosaic.host.seams import check_seams, replaced, unpatched
from megatron_mosaic.host.sharing import log_lanes, open_lanes
from megatron_mosaic.host.telemetry import Telemetry
from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.sharing.lane import Lanes


@dataclass(kw_only=True)
class PlanGroups(MultiModuleProcessGroupCollection):
    """Groups of this rank's modules, with the schedule that a patched fork looks for there."""

    forward_backward_func: Callable[..., list[dict]] | None = None


def pretrain(
    cfg_container: Any,
    train_valid_test_dataset_provider: DatasetProvider,
    model_type: Any,
    forward_step_func: Callable[..., Any],
    model_provider: Callable[..., torch.nn.Module] | None = None,
    **options: Any,
) -> None:
    """Trains as Megatron's function of the same name; with a plan, under its layouts.

    Arguments are Megatron's. A plan is given by ``--mosaic-plan``; without it this is Megatron's
    own function.

    Raises:
        SystemExit: Code 2 if the plan, the script or its data contradict each other.

    Note:
        Collective over the world.
    """
    args = get_args()
    meeting: Meeting | None = getattr(args, "mosaic_meeting", None)
    if meeting is None or model_provider is None:
        stock_pretrain(
            cfg_container,
            train_valid_test_dataset_provider,
            model_type,
            forward_step_func,
            model_provider,
            **options,
        )
        return
    try:
        check_seams()
        with _watched(meeting, args) as progress:
            _pretrain_plan(
                cfg_container,
                train_valid_test_dataset_provider,
                model_type,
                forward_step_func,
                model_provider,
                meeting,
                progress,
                **options,
            )
    except (PlanError, LayoutError, HostError) as error:
        # All ranks have the error: it came from equal data, or one told the others.
        speaker = error.speaker if isinstance(error, RankError) else 0
        stop(str(error) if args.rank == speaker else None)


def _pretrain_plan(
    cfg_container: Any,
    dataset_provider: DatasetProvider,
    model_type: Any,
    forward_step_func: Callable[..., Any],
    model_provider: Callable[..., torch.nn.Module],
    meeting: Meeting,
    progress: Progress,
    **options: Any,
) -> None:
    args = get_args()
    runtime = start_runtime(meeting, args)
    log_choices(args, meeting.plan)
    log_lanes(runtime)
    prepare_loading(args, group=runtime.host_group)
    cfg_container.model = MosaicModelConfig(_provider=model_provider, _runtime=runtime)
    flops = StepFlops()
    assert progress.trace is not None, "a run under a plan is recorded"
    forward_backward = PlanForwardBackward(runtime, progress=progress, flops=flops)
    # A patched fork asks these for what it would otherwise find replaced.
    args.num_floating_point_operations_func = flops
    replacements = {
        "megatron.training.training:get_forward_backward_func": forward_backward.select,
        "megatron.training.training:num_floating_point_operations": flops,
        "megatron.training.training:training_log": Telemetry(
            runtime, flops=flops, recorder=progress.trace
        ),
        "megatron.training.training:save_checkpoint": unmark_before_saving(stock_save_checkpoint),
        "megatron.training.checkpointing:maybe_save_dataloader_state": save_loader_states,
        "megatron.training.checkpointing:read_metadata": tracker_reader(args),
        "megatron.core.models.mimo.optimizer:MimoOptimizer": partial(
            LayoutFreeOptimizer, group=runtime.host_group
        ),
    }
    with explained_failures(group=runtime.host_group), replaced(unpatched(replacements)):
        stock_pretrain(
            cfg_container,
            ReadingByModule(provider=dataset_provider, runtime=runtime),
            model_type,
            forward_step_func,
            None,
            store=meeting.store,
            pg_collection=_plan_groups(runtime, forward_backward),
            skip_model_parallel_init=True,
            **options,
        )


def _plan_groups(runtime: Runtime, forward_backward: PlanForwardBackward) -> PlanGroups:
    collections = {name: groups.collection for name, groups in runtime.hosted.items()}
    return PlanGroups(
        # An idle rank has no module, and the type wants one.
        module_pgs=collections or {"idle": lone_collection(runtime.alone)},
        language_model_module_name=LANGUAGE if LANGUAGE in collections else None,
        forward_backward_func=forward_backward,
    )


@contextmanager
def _watched(meeting: Meeting, args: argparse.Namespace) -> Iterator[Progress]:
    """Follows this rank; the loss of any other ends it."""
    with _open_recorder(meeting, args) as trace:
        if meeting.plan.world_size == 1:
            yield Progress(trace=trace)
            return
        record = RecordFile(rank=args.rank)
        progress = Progress(record.buffer, trace=trace)
        with Watch(
            meeting.store,
            plan=meeting.plan,
            progress=progress,
            record=record,
            rank=args.rank,
            limits=limits_of(args),
            minds_sigterm=not (args.exit_signal_handler or args.exit_signal_handler_for_training),
        ):
            yield progress


def _open_recorder(meeting: Meeting, args: argparse.Namespace) -> TaskRecorder:
    """Records the steps that are logged; all of them, in a file, where a trace is asked for."""
    clock = DeviceClock() if torch.cuda.is_available() else HostClock()
    if args.mosaic_trace is not None:
        return _open_trace(meeting, args, clock)
    return TaskRecorder(clock=clock, wants=lambda iteration: iteration % args.log_interval == 0)


def _open_trace(meeting: Meeting, args: argparse.Namespace, clock: Clock) -> TaskRecorder:
    """Opens this rank's file, or stops all ranks if one cannot."""
    folder, trace, error = Path(args.mosaic_trace), None, None
    try:
        trace = TaskTrace(folder, rank=args.rank, clock=clock)
        if args.rank == 0:
            remove_former_ranks(folder, world_size=meeting.plan.world_size)
    except OSError as failure:
        error = (
            f"arguments: mosaic_trace={folder} must be a folder in which rank {args.rank} can "
            f"write, not give '{failure.strerror}'; name another one"
        )
    meeting.agreement.settle("trace", error)
    assert trace is not None, "an error of any rank has been raised on all"
    return trace


def start_runtime(meeting: Meeting, args: argparse.Namespace) -> Runtime:
    """Starts torch.distributed and creates every group of the plan.

    Note:
        Collective over the world.
    """
    if not dist.is_initialized() and torch.cuda.is_available() and torch.cuda.device_count() > 0:
        torch.cuda.set_device(args.local_rank)
    lanes = open_lanes(meeting, args)
    if not dist.is_initialized():
        dist.init_process_group(
            backend=args.distributed_backend,
            store=meeting.store,
            rank=args.rank,
            world_size=args.world_size,
        )
    parallel_state._set_global_memory_buffer()
    factory = GroupFactory(args.rank)
    try:
        return _create_runtime(meeting, factory, rank=args.rank, lanes=lanes)
    except Exception:
        factory.destroy()
        raise


def _create_runtime(
    meeting: Meeting, factory: GroupFactory, *, rank: int, lanes: Lanes | None
) -> Runtime:
    plan = meeting.plan
    hosted = module_groups(plan, factory, rank=rank)
    host_group = factory.group(range(plan.world_size), scope="host", backend="gloo")
    data_group = factory.group(range(plan.world_size), scope="data", backend="gloo")
    assert host_group is not None
    assert data_group is not None
    return Runtime(
        plan=plan,
        rank=rank,
        hosted=hosted,
        alone=factory.alone(plan.world_size),
        host_group=host_group,
        data_group=data_group,
        channels=ChannelSet(plan, factory, rank=rank, nodes=nodes_of_ranks(host_group)),
        agreement=meeting.agreement,
        factory=factory,
        lanes=lanes,
    )
