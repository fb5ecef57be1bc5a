"""Upstream's pipeline schedules with modules that wait instead of computing."""

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.pipeline_parallel.bridge_communicator import BridgeCommunicator
from megatron.core.pipeline_parallel.multimodule_communicator import (
    MultiModulePipelineCommunicator,
)
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.process_groups_config import (
    MultiModuleProcessGroupCollection,
    ProcessGroupCollection,
)

from benchmarks.timed_plans import TimedPlan
from benchmarks.timed_run import HIDDEN_SIZE, SEQUENCE_LENGTH, wait_until
from megatron_mosaic.layout.placement import LANGUAGE, ModulePlacement
from megatron_mosaic.schedule.graph import Stage
from megatron_mosaic.schedule.simulate import PassTimes

Shape = tuple[int, ...]


class _Wait(torch.autograd.Function):
    """Takes its time both ways, and makes zeros."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, times: PassTimes, shape: Shape) -> torch.Tensor:
        until_s = time.monotonic() + times.forward_s
        ctx.times, ctx.shape = times, values.shape
        made = torch.zeros(shape)
        wait_until(until_s)
        return made

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        until_s = time.monotonic() + ctx.times.backward_s
        made = torch.zeros(ctx.shape)
        wait_until(until_s)
        return made, None, None


class _WaitingStage(torch.nn.Module):
    """A stage of a module, as upstream's schedules call one.

    Args:
        module: The module.
        times: Of its tasks.
        shape: Of what it makes.
        config: Of upstream.
    """

    def __init__(
        self, module: str, times: PassTimes, shape: Shape, config: ModelParallelConfig
    ) -> None:
        super().__init__()
        self.config = config
        self.waits = True
        self._module = module
        self._times = times
        self._shape = shape
        self._leaf = torch.nn.Parameter(torch.zeros(1))
        self._received: Any = None

    def set_input_tensor(self, received: Sequence[Any]) -> None:
        """Takes what came from the stages before."""
        self._received = received[0]

    def forward(self) -> Any:
        """Waits, and makes what leaves."""
        received = self._received
        of_modules = isinstance(received, dict)
        parts = list(received.values()) if of_modules else [received]
        parts = [part[0] if isinstance(part, list) else part for part in parts]
        parts = [part.flatten() for part in parts if part is not None]
        values = torch.cat(parts) if parts else self._leaf
        times = self._times if self.waits else PassTimes(0.0, 0.0)
        made = _Wait.apply(values, times, self._shape)
        return {self._module: made} if of_modules else made


def _forward_step(data: None, model: _WaitingStage) -> tuple[Any, Any]:
    return model(), _loss


def _loss(output: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    values = output[LANGUAGE] if isinstance(output, dict) else output
    return values.sum(), {}


class UpstreamDisjoint:
    """Upstream's 1F1B over modules on disjoint, consecutive ranks.

    Args:
        timed: The plan, of kind ``1f1b``, and its times.
        rank: This rank; every rank has a module.

    Note:
        Collective over the world.
    """

    def __init__(self, timed: TimedPlan, *, rank: int) -> None:
        plan = timed.plan
        config = ModelParallelConfig(pipeline_dtype=torch.float32, variable_seq_lengths=True)
        config.hidden_size = HIDDEN_SIZE  # type: ignore[attr-defined]
        self._grids = {name: _grid(placement) for name, placement in plan.modules.items()}
        topology: dict[str, list[str]] = {name: [] for name in plan.modules}
        for source, destination in plan.edges:
            topology[source].append(destination)
        self._communicator = MultiModulePipelineCommunicator(
            self._grids, topology, config, dim_mapping={"s": 0, "b": 1, "h": 2}
        )
        (name,) = plan.modules_of(rank)
        self._groups = MultiModuleProcessGroupCollection(
            module_pgs={name: _collection(self._grids[name])},
            language_model_module_name=LANGUAGE if name == LANGUAGE else None,
        )
        self._model = _stage(timed, name, rank, config)
        self._num_microbatches = plan.num_microbatches

    def step(self, *, waits: bool) -> None:
        """Runs a step."""
        self._model.waits = waits
        _run(self._model, self._num_microbatches, self._communicator, self._groups)

    def destroy(self) -> None:
        """Destroys the groups that were made."""
        BridgeCommunicator.destroy_broadcast_pgs()
        BridgeCommunicator.destroy_bridge_pgs()
        for grid in self._grids.values():
            grid.destroy()


class UpstreamThreePhase:
    """Encoders over the whole batch, upstream's 1F1B of the language model, encoders back.

    This release has no such schedule for a pipelined language model; upstream's pull request 4784
    has it, and this does what it says: all ranks gather what the encoders made, and the first
    stage's gradient goes to all ranks.

    Args:
        timed: The plan, of kind ``colocated`` with one group and one encoder, and its times.
        rank: This rank; every rank has both modules.

    Note:
        Collective over the world.
    """

    def __init__(self, timed: TimedPlan, *, rank: int) -> None:
        plan = timed.plan
        (self._encoder,) = plan.encoders
        config = ModelParallelConfig(pipeline_dtype=torch.float32)
        config.hidden_size = HIDDEN_SIZE  # type: ignore[attr-defined]
        self._grid = _grid(plan.language)
        self._groups = _collection(self._grid)
        self._communicator = P2PCommunicator(self._groups.pp, config)
        self._model = _stage(timed, LANGUAGE, rank, config)
        self._times = timed.tasks_s[Stage(self._encoder, 0)]
        self._num_microbatches = plan.num_microbatches
        samples = plan.global_batch_size // plan.modules[self._encoder].data_parallel_size
        self._shape = (SEQUENCE_LENGTH, samples, HIDDEN_SIZE)
        self._world_size = plan.world_size

    def step(self, *, waits: bool) -> None:
        """Runs a step."""
        self._model.waits = waits
        times = self._times if waits else PassTimes(0.0, 0.0)
        leaf = torch.zeros(1, requires_grad=True)
        rows = _Wait.apply(leaf, times, self._shape)
        batch = [torch.empty(self._shape) for _ in range(self._world_size)]
        dist.all_gather(batch, rows.detach())
        _run(self._model, self._num_microbatches, self._communicator, self._groups)
        gradient = torch.zeros(self._shape)
        dist.broadcast(
            gradient, src=dist.get_process_group_ranks(self._groups.pp)[0], group=self._groups.pp
        )
        rows.backward(gradient)

    def destroy(self) -> None:
        """Destroys the groups that were made."""
        self._grid.destroy()


def _run(model: _WaitingStage, num_microbatches: int, communicator: Any, groups: Any) -> None:
    forward_backward_pipelining_without_interleaving(
        forward_step_func=_forward_step,
        data_iterator=None,  # type: ignore[arg-type]
        model=[model],
        num_microbatches=num_microbatches,
        seq_length=SEQUENCE_LENGTH,
        micro_batch_size=model._shape[1],
        p2p_communicator=communicator,
        pg_collection=groups,
    )


def _stage(timed: TimedPlan, name: str, rank: int, config: ModelParallelConfig) -> _WaitingStage:
    placement = timed.plan.modules[name]
    (stage,) = placement.stages_of(rank)
    samples = timed.plan.micro_batch_size * timed.plan.language.data_parallel_size
    shape = (SEQUENCE_LENGTH, samples // placement.data_parallel_size, HIDDEN_SIZE)
    return _WaitingStage(name, timed.tasks_s[Stage(name, stage)], shape, config)


def _grid(placement: ModulePlacement) -> HyperCommGrid:
    ranks = placement.ranks
    assert ranks == tuple(range(ranks[0], ranks[0] + len(ranks))), "a grid's ranks are consecutive"
    grid = HyperCommGrid(
        shape=[
            placement.tensor_model_parallel_size,
            placement.context_parallel_size,
            placement.data_parallel_size,
            placement.pipeline_model_parallel_size,
        ],
        dim_names=["tp", "cp", "dp", "pp"],
        rank_offset=ranks[0],
    )
    for name in ("tp", "cp", "dp", "pp"):
        grid.create_pg([name])
    return grid


def _collection(grid: HyperCommGrid) -> ProcessGroupCollection:
    groups = ProcessGroupCollection()
    groups.tp, groups.cp = grid.get_pg("tp"), grid.get_pg("cp")
    groups.dp, groups.pp = grid.get_pg("dp"), grid.get_pg("pp")
    return groups
