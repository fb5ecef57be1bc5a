"""What the two training scripts of a rehearsal have in common.

They know nothing of a plan but which modules it names and which of their weights train: the same
functions train in one process under stock Megatron.
"""

import argparse
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.training import get_args
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from torch.utils.data import default_collate

from megatron_mosaic.host.trainable import selects
from megatron_mosaic.host.weights import global_named_parameters
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.rehearsal.tiny import TinyModel, tiny_model

Batch = dict[str, torch.Tensor]


@cache
def _load(path: str) -> Plan:
    return Plan.load(path)


def rehearsed() -> tuple[Plan, TinyModel]:
    """The plan that is rehearsed, and the sizes of its model."""
    plan = _load(get_args().rehearsed_plan)
    return plan, tiny_model(plan)


def add_script_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds what the scripts take."""
    group = parser.add_argument_group(title="rehearsal")
    group.add_argument("--rehearsed-plan", required=True, help="plan whose modules are built")
    # As pretrain_vlm.py has it: images have no other tokens than their patches.
    group.add_argument("--disable-vision-class-token", default=True)
    return parser


def freeze(model: torch.nn.Module, plan: Plan, parts: Mapping[str, Mapping[str, str]]) -> None:
    """Leaves trainable what the plan says.

    Args:
        model: The whole model, or what a rank has of it.
        plan: The plan.
        parts: Place in the model of each part, by module.
    """
    for name, _, parameter in global_named_parameters(model):
        for module, places in parts.items():
            listed = plan.modules[module].trainable
            for part, place in places.items():
                if listed is not None and name.startswith(f"{place}."):
                    planned = part + name[len(place) :]
                    parameter.requires_grad_(any(selects(entry, planned) for entry in listed))


class Samples(torch.utils.data.Dataset):
    """Samples that their index determines.

    Args:
        num_samples: How many there are.
        sample_of: Makes one of them.
        media: Keys of which a sample has a row for each item, and so any number.
    """

    def __init__(
        self, num_samples: int, sample_of: Callable[[int], Batch], *, media: Sequence[str]
    ) -> None:
        self._num_samples = num_samples
        self._sample_of = sample_of
        self._media = tuple(media)

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Batch:
        return self._sample_of(index)

    def collate_fn(self, samples: Sequence[Batch]) -> Batch:
        """Puts the items of all samples one after the other."""
        media = {key: torch.cat([sample[key] for sample in samples]) for key in self._media}
        others = [{k: v for k, v in each.items() if k not in media} for each in samples]
        return default_collate(others) | media


def text_of(generator: torch.Generator, *, index: int, length: int, vocabulary: int) -> Batch:
    """Draws the text of a sample, with a mask of its own: means over samples then differ."""
    mask = (torch.rand(length, generator=generator) < 0.2 + 0.1 * (index % 7)).float()
    mask[-1] = 1.0
    return {
        "tokens": torch.randint(0, vocabulary, (length,), generator=generator),
        "labels": torch.randint(0, vocabulary, (length,), generator=generator),
        "loss_mask": mask,
        "position_ids": torch.arange(length),
    }


def read_batch(
    data: Batch | None, *, media: Mapping[str, tuple], floats: Sequence[str] = ()
) -> Batch:
    """Sends a batch to the tensor-parallel ranks.

    Args:
        data: The batch, on the ranks that read.
        media: Shape of an item, by key: a batch may have none.
        floats: Further keys, each with a row for every token.
    """
    if data is not None:
        # broadcast_data cannot send a tensor without elements.
        spare = {key: torch.zeros(1, *shape) for key, shape in media.items()}
        data = {**data, **{key: torch.cat([data[key], spare[key]]) for key in media}}
    integers = tensor_parallel.broadcast_data(
        ["tokens", "labels", "position_ids"], data, torch.int64
    )
    others = tensor_parallel.broadcast_data([*media, "loss_mask", *floats], data, torch.float32)
    return integers | others | {key: others[key][:-1] for key in media}


def loss_func(loss_mask: torch.Tensor, output: torch.Tensor) -> tuple[Any, ...]:
    """Sums the loss of the tokens that count."""
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * mask)
    num_tokens = mask.sum().clone().detach().to(torch.int)
    report = torch.cat([loss.clone().detach().view(1), num_tokens.view(1)])
    return loss, num_tokens, {"lm loss": report}


def run_script(
    parse_and_validate_args: Callable[..., Any],
    pretrain: Callable[..., None],
    *,
    datasets_provider: Any,
    forward_step: Callable[..., Any],
    provider: Callable[..., torch.nn.Module],
) -> None:
    """Runs a script with Megatron's two entry functions, or with Mosaic's."""
    warnings.simplefilter("ignore")
    datasets_provider.is_distributed = True
    args = parse_and_validate_args(extra_args_provider=add_script_args)
    pretrain(
        pretrain_cfg_container_from_args(args),
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        provider,
    )
