"""Runs the script on one rank and records gradients, weights and losses of every step."""

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

ARGUMENTS = [
    "--encoder-num-layers",
    "2",
    "--decoder-num-layers",
    "4",
    "--hidden-size",
    "32",
    "--num-attention-heads",
    "4",
    "--ffn-hidden-size",
    "64",
    "--seq-length",
    "8",
    "--max-position-embeddings",
    "64",
    "--position-embedding-type",
    "rope",
    "--img-h",
    "28",
    "--img-w",
    "28",
    "--patch-dim",
    "14",
    "--disable-vision-class-token",
    "--normalization",
    "RMSNorm",
    "--train-iters",
    "4",
    "--lr",
    "1e-2",
    "--lr-decay-style",
    "constant",
    "--weight-decay",
    "0.01",
    "--clip-grad",
    "1.0",
    "--attention-dropout",
    "0",
    "--hidden-dropout",
    "0",
    # After step 3, and twice at the end: of validation and of test data.
    "--eval-interval",
    "3",
    "--eval-iters",
    "1",
    "--log-interval",
    "1",
    "--tokenizer-type",
    "NullTokenizer",
    "--vocab-size",
    "61",
    "--make-vocab-size-divisible-by",
    "16",
    "--transformer-impl",
    "local",
    "--disable-bias-linear",
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-bias-dropout-fusion",
    "--no-bias-gelu-fusion",
    "--no-bias-swiglu-fusion",
    "--no-rope-fusion",
    "--no-persist-layer-norm",
    "--split",
    "100,0,0",
    "--num-workers",
    "0",
    "--micro-batch-size",
    "2",
    "--global-batch-size",
    "16",
]
OPTIMIZERS = {
    "sgd": ["--optimizer", "sgd", "--sgd-momentum", "0.9"],
    # At the default eps of 1e-8 Adam turns the rounding noise of tiny gradients into full steps.
    "adam": ["--optimizer", "adam", "--adam-eps", "1e-4", "--lr", "1e-3"],
}


class Shard(NamedTuple):
    """A rank's part of a tensor: where it lies, and which of equal parts counts."""

    dim: int  # along which (expert) tensor parallelism splits it, or -1
    stride: int
    tp: int
    summed: bool  # whether the parts of data-parallel replicas add up
    values: np.ndarray


@dataclass
class Record:
    """What one rank saw."""

    losses: list[dict[str, list[float]]] = field(default_factory=list)
    evaluations: list[dict[str, list[float]]] = field(default_factory=list)
    gradients: list[dict[str, Shard]] = field(default_factory=list)
    weights: list[dict[str, Shard]] = field(default_factory=list)
    communication: Any = None


def record_plan(
    rank: int,
    plan_path: str,
    options: list[str],
    faults: tuple[str, ...] = (),
    script: str = "vlm_script",
    *,
    on_cpu: bool = True,
    lane: Callable[[], str] = lambda: "",
) -> Record:
    """Trains under a plan. Called on every rank."""
    from megatron_mosaic.host.cpu import run_on_cpu

    if on_cpu:
        run_on_cpu()
    from megatron_mosaic.comm.record import record as recording
    from megatron_mosaic.host import training
    from megatron_mosaic.host.arguments import parse_and_validate_args
    from megatron_mosaic.host.forward_backward import PlanForwardBackward
    from tests.parity.faults import plant

    record = Record()
    runtimes = []

    class RecordingForwardBackward(PlanForwardBackward):
        def __init__(self, runtime: Any, **options: Any) -> None:
            super().__init__(runtime, **options)
            runtimes.append(runtime)

        def __call__(self, *, forward_only: bool = False, **arguments: Any) -> list[dict]:
            losses = super().__call__(forward_only=forward_only, **arguments)
            (record.evaluations if forward_only else record.losses).append(_numbers(losses))
            if not forward_only:
                record.losses[-1] |= _auxiliary_losses(arguments["num_microbatches"])
                record.gradients.append(dict(_hosted(self._runtime, _gradient)))
                record.weights.append(dict(_hosted(self._runtime, _weight)))
            return losses

    training.PlanForwardBackward = RecordingForwardBackward
    for fault in faults:
        plant(fault, rank)
    sys.argv = ["script", *ARGUMENTS, *options, "--mosaic-plan", plan_path]
    with recording(lane) as log:
        _script(script).main(parse_and_validate_args, training.pretrain)
    record.weights.append(dict(_hosted(runtimes[0], _weight)))
    record.communication = log
    return record


def _script(name: str) -> Any:
    """Imports a training script once Megatron is ready for the CPU."""
    return importlib.import_module(f"tests.parity.{name}")


def record_stock(
    rank: int, options: list[str], script: str = "vlm_script", *, by_name: bool = True
) -> Record:
    """Trains under stock Megatron in one process, from the same initial weights."""
    from megatron_mosaic.host.cpu import run_on_cpu

    run_on_cpu()
    from megatron.training import pretrain, training
    from megatron.training.arguments import parse_and_validate_args

    record = Record()
    models = []
    stock_func = training.get_forward_backward_func

    def recording_func(*unused: Any, **also_unused: Any) -> Any:
        forward_backward = stock_func()

        def run(*, forward_only: bool, model: Any, **arguments: Any) -> list[dict]:
            losses = forward_backward(forward_only=forward_only, model=model, **arguments)
            total = _totals(losses)
            (record.evaluations if forward_only else record.losses).append(total)
            if not forward_only:
                record.losses[-1] |= _auxiliary_losses(arguments["num_microbatches"])
                record.gradients.append(dict(_shards(model[0], _gradient)))
                record.weights.append(dict(_shards(model[0], _weight)))
                models[:] = model
            return losses

        return run

    training.get_forward_backward_func = recording_func
    functions = _script(script)
    functions.train_valid_test_datasets_provider = _one_reader(
        functions.train_valid_test_datasets_provider
    )
    sys.argv = ["script", *ARGUMENTS, *options, "--dataloader-type", "external"]
    provider = functions.model_provider
    if by_name:
        provider = initialized_by_name(provider)
    functions.main(parse_and_validate_args, pretrain, provider)
    record.weights.append(dict(_shards(models[0], _weight)))
    return record


def initialized_by_name(provider: Any) -> Any:
    """Returns a model provider whose models have initial weights by name."""
    return partial(_provide_by_name, provider)


def _provide_by_name(provider: Any, *arguments: Any, **options: Any) -> torch.nn.Module:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import get_args

    from megatron_mosaic.host.groups import ModuleGroups
    from megatron_mosaic.host.weights import initialize_by_name
    from megatron_mosaic.layout.placement import ModulePlacement

    model = provider(*arguments, **options)
    placement = ModulePlacement(name="language", ranks=(0,))
    groups = ModuleGroups(
        placement=placement,
        position=placement.coordinates(0),
        expert_position=placement.expert_coordinates(0),
        collection=ProcessGroupCollection(),
    )
    initialize_by_name(model, seed=get_args().seed, groups=groups)
    return model


def _one_reader(provider: Any) -> Any:
    """Reads the same microbatches in order: torch's loader cannot stack ragged images."""

    def iterators(num_samples: list[int]) -> tuple:
        from megatron.training import get_args

        size = get_args().micro_batch_size
        # Megatron leaves it to an external loader to go on where a checkpoint stopped.
        starts = (get_args().consumed_train_samples, 0, 0)
        return tuple(
            read(data, size, start)
            for data, start in zip(provider(num_samples), starts, strict=True)
        )

    def read(data: Any, size: int, start: int) -> Any:
        if data is None or isinstance(data, torch.utils.data.IterableDataset):
            return data and iter(data)  # it yields whole microbatches
        rest = torch.utils.data.Subset(data, range(start, len(data)))
        return iter(torch.utils.data.DataLoader(rest, size, collate_fn=data.collate_fn))

    iterators.is_distributed = True
    return iterators


def _numbers(losses: list[dict]) -> dict[str, list[float]]:
    return {key: value.double().tolist() for key, value in losses[0].items()} if losses else {}


def _auxiliary_losses(num_microbatches: int) -> dict[str, list[float]]:
    """Returns what routers recorded for each layer in this step, as the stock loop scales it."""
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    metrics = get_moe_metrics_tracker().metrics
    return {
        name: (entry.values.double() / num_microbatches).tolist() for name, entry in metrics.items()
    }


def _totals(losses: list[dict]) -> dict[str, list[float]]:
    """Sums (loss, tokens) pairs over microbatches; averages single values."""
    totals = {}
    for key in losses[0]:
        values = torch.stack([entry[key].double().reshape(-1) for entry in losses])
        totals[key] = (values.sum(0) if values.shape[1] == 2 else values.mean(0)).tolist()
    return totals


def _hosted(runtime: Any, read: Any) -> Iterator[tuple[str, Shard]]:
    for runner in runtime.runners.values():
        yield from _shards(runner.model, partial(_read_of, read, runner.wrapped), runner.groups)


def _read_of(read: Any, wrapped: Any, model: Any, parameter: Any) -> tuple:
    """Reads from the whole module, of which a stage may have only its weights."""
    return read(wrapped, parameter)


def _shards(model: torch.nn.Module, read: Any, groups: Any = None) -> Iterator[tuple[str, Shard]]:
    from megatron.core.utils import unwrap_model

    from megatron_mosaic.host.weights import global_named_parameters, partition_of, split_of

    for name, _, parameter in global_named_parameters(unwrap_model(model)):
        values, summed = read(model, parameter)
        if values is None:
            continue
        dim, stride = partition_of(parameter)
        yield (
            name,
            Shard(
                dim=dim,
                stride=stride,
                tp=split_of(parameter, groups=groups).index if groups else 0,
                summed=summed,
                values=values.detach().float().cpu().numpy().copy(),
            ),
        )


def _weight(model: torch.nn.Module, parameter: torch.Tensor) -> tuple[torch.Tensor, bool]:
    return parameter, False


def _gradient(model: Any, parameter: Any) -> tuple[torch.Tensor | None, bool]:
    """Returns a gradient after its reduction; with a sharded optimizer only this rank's part."""
    if not parameter.requires_grad:
        return None, False
    if not model.ddp_config.use_distributed_optimizer:
        return parameter.main_grad, False
    for group in model.bucket_groups + model.expert_parallel_bucket_groups:
        for bucket in group.buckets:
            if parameter in bucket.param_to_index:
                return _own_part(group, bucket, parameter), True
    raise AssertionError("the parameter is in no bucket")


def _own_part(group: Any, bucket: Any, parameter: Any) -> torch.Tensor:
    size = group.intra_distributed_optimizer_instance_size
    rank = group.intra_distributed_optimizer_instance_rank
    share = bucket.grad_data.numel() // size
    start, stop = bucket.param_to_index[parameter]
    index = torch.arange(start, stop, device=parameter.device)
    own = (index >= rank * share) & (index < (rank + 1) * share)
    return parameter.main_grad * own.view_as(parameter)
