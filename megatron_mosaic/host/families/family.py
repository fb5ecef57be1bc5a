"""What the runtime asks of a kind of model, so that it need not know any."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch

from megatron_mosaic.comm.boundary import ItemShape, Samples
from megatron_mosaic.errors import PlanError
from megatron_mosaic.host.groups import ModuleGroups
from megatron_mosaic.layout.ownership import Runs

Batch = Mapping[str, torch.Tensor]


class ModuleBoundary(Protocol):
    """Translates between one module's tensors and boundary rows ``[rows, width]``.

    Autograd runs through the translation: the gradient of rows are rows.
    """

    width: int
    """Width of the rows that the module makes."""

    def rows_of(self, output: Any) -> torch.Tensor:
        """Turns what the module returned into rows, sample after sample."""
        ...

    item: ItemShape
    """What the module turns into rows."""

    def inputs_of(self, rows: Mapping[str, torch.Tensor], *, samples: Mapping[str, Samples]) -> Any:
        """Turns rows into what ``set_input_tensor`` takes.

        Args:
            rows: Rows that this rank keeps, by the module that made them.
            samples: Where the rows belong of each sample of this rank's replica, by the same.
        """
        ...

    def row_runs(self, batch: Batch) -> Mapping[str, Sequence[Runs]]:
        """Finds where the rows of every sample of a batch that this module reads belong.

        Returns:
            Positions of the rows by the module that makes them: this one, and those that feed it.

        Raises:
            HostError: The batch contradicts itself, or lacks what is counted.
        """
        ...

    def flops_per_row(self, args: argparse.Namespace, *, trained: Mapping[str, float]) -> float:
        """Counts the operations of forward and backward pass behind one row of this module.

        Args:
            args: Megatron's arguments.
            trained: Part of the weights that trains, by part of the module.
        """
        ...


class ModelFamily(Protocol):
    """A kind of model: how it is built in parts, and what the parts are called."""

    model_class: type[torch.nn.Module]
    """What a script's ``model_provider`` returns."""

    def building_one_module(
        self, groups: ModuleGroups, *, modules: Sequence[str]
    ) -> AbstractContextManager[None]:
        """Makes the class build one module only, on that module's groups and sizes.

        Args:
            groups: Groups of the module.
            modules: All modules of the plan.

        Raises:
            PlanError: The model has other modules than the plan; raised by the constructor.
        """
        ...

    def parts(self, model: torch.nn.Module, name: str) -> Mapping[str, str]:
        """Tells where the parts of a plan's ``trainable`` lie in the built module."""
        ...

    def boundary(self, model: torch.nn.Module, name: str) -> ModuleBoundary:
        """Returns the translator of a built module, which may be wrapped."""
        ...


@contextmanager
def building_one_module(
    families: Sequence[ModelFamily], groups: ModuleGroups, *, modules: Sequence[str]
) -> Iterator[None]:
    """Makes the model class of every family build one module only, whichever the script uses."""
    with ExitStack() as stack:
        for family in families:
            stack.enter_context(family.building_one_module(groups, modules=modules))
        yield


def family_of(model: torch.nn.Module, families: Sequence[ModelFamily]) -> ModelFamily:
    """Finds the family of what a script's provider built.

    Raises:
        PlanError: No family knows it.
    """
    for family in families:
        if isinstance(model, family.model_class):
            return family
    known = [family.model_class.__name__ for family in families]
    raise PlanError(
        f"script: model={type(model).__name__} must be one of {known} under a plan; "
        f"return one of them from model_provider"
    )
