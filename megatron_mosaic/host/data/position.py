"""Where loaders stand in their data, kept beside the checkpoints of the model.

Files have the names and contents of Megatron's own, one for each language replica, so that a
script restores its loaders as it does without a plan.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.training.checkpointing import get_checkpoint_name
from megatron.training.utils import print_rank_0

from megatron_mosaic.errors import HostError
from megatron_mosaic.host.data.facts import FactsLayout, SampleFacts
from megatron_mosaic.host.data.loaders import LoaderSource
from megatron_mosaic.host.data.reader import StepReader


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Where training goes on.

    Args:
        skipped: Microbatches of every replica that the loaders have to be read past.
        expected: Facts of the first step's samples, where a checkpoint knows them.
    """

    skipped: int = 0
    expected: Sequence[SampleFacts] | None = None


class PlacedReader(StepReader):
    """A reader that keeps where its loaders stand beside the checkpoints of the model."""

    def save_dataloader_state(self, iteration: int, dataloader_save_path: str) -> None:
        """Saves what this rank has to save; a patched fork calls it by this name.

        Args:
            iteration: Steps trained.
            dataloader_save_path: ``args.dataloader_save``.
        """
        source = self.source
        if not isinstance(source, LoaderSource) or source.saved_replica is None:
            return  # another rank saves, or the samples consumed say it all
        replica = source.saved_replica
        path = _state_file(dataloader_save_path, iteration, replica)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"dataloader_state_dict": self.next_state}, path)
        facts = self.next_facts()
        if replica == 0 and facts is not None:
            rows = [self.layout.row(each) for each in facts]
            _facts_file(dataloader_save_path, iteration).write_text(json.dumps(rows))


def save_loader_states(
    train_iterator: Any, iteration: int, dataloader_save_path: str | None, **groups: Any
) -> None:
    """Stands for Megatron's ``maybe_save_dataloader_state``.

    Megatron would save from the first rank of the groups that it is given, and on each rank those
    are of that rank alone.

    Args:
        train_iterator: Megatron's wrapper of the reader of training data.
        iteration: Steps trained.
        dataloader_save_path: ``args.dataloader_save``; None or empty saves nothing.
        groups: Not used.
    """
    if train_iterator is not None and dataloader_save_path:
        train_iterator.iterable.save_dataloader_state(iteration, dataloader_save_path)


def find_position(args: argparse.Namespace, *, num_replicas: int, layout: FactsLayout) -> Position:
    """Finds where loaders have to go on.

    Args:
        args: Megatron's arguments, after the model's checkpoint was read.
        num_replicas: Replicas of the language model.
        layout: How facts of samples are laid out.

    Raises:
        HostError: The states are of another number of replicas.
    """
    if args.consumed_train_samples == 0:
        return Position()
    folder = getattr(args, "dataloader_save", None)
    states = _state_file(folder, args.iteration, 0).parent if folder else None
    num_states = len(list(states.glob(_state_name("*")))) if states else 0
    if folder and num_states:
        if num_states != num_replicas:
            raise HostError(
                f"arguments: dataloader_save={folder} with states of {num_states} replicas must "
                f"have one for each of the {num_replicas} replicas of the language model; resume "
                f"under a plan of {num_states}, or remove the option to read past what was trained"
            )
        return Position(expected=_read_facts(_facts_file(folder, args.iteration), layout))
    skipped = args.consumed_train_samples // (args.micro_batch_size * num_replicas)
    print_rank_0(
        f"mosaic: reading past {skipped} microbatches of each replica that were trained before; "
        f"--dataloader-save keeps the loaders' states instead"
    )
    return Position(skipped=skipped)


def _state_name(replica: str) -> str:
    return f"train_dataloader_dprank{replica}.pt"


def _state_file(folder: str, iteration: int, replica: int) -> Path:
    return Path(
        get_checkpoint_name(
            folder,
            iteration,
            pipeline_parallel=False,
            tensor_rank=0,
            pipeline_rank=0,
            expert_parallel=False,
            expert_rank=0,
            basename=_state_name(f"{replica:03d}"),
        )
    )


def _facts_file(folder: str, iteration: int) -> Path:
    return _state_file(folder, iteration, 0).with_name("train_next_samples.json")


def _read_facts(path: Path, layout: FactsLayout) -> Sequence[SampleFacts] | None:
    """Reads what followed a checkpoint; stock Megatron does not write it."""
    if not path.is_file():
        return None
    rows = json.loads(path.read_text())
    if any(len(row) != layout.size for row in rows):
        return None  # another plan tells other facts
    return tuple(map(layout.facts, rows))
