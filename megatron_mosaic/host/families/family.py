"""What the runtime asks of a kind of model, so that it need not know any."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mosaic.comm.boundary import ItemShape
from megatron_mosaic.errors import HostError, PlanError
from megatron_mosaic.host.data.batches import batch_fields
from megatron_mosaic.host.groups import ModuleGroups
from megatron_mosaic.layout.item_costs import ItemCost
from megatron_mosaic.layout.model_facts import ModuleFacts
from megatron_mosaic.layout.ownership import Runs
from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.layout.rows import Interval

if TYPE_CHECKING:
    from megatron_mosaic.host.data.facts import SampleFacts

# A mapping or dataclass of tensors, as a script's collate function returns it.
Batch = Any


class ModuleBoundary(Protocol):
    """Translates between one module's tensors and boundary rows ``[rows, width]``.

    Autograd runs through the translation: the gradient of rows are rows.
    """

    width: int
    """Width of the rows that the module makes."""

    makes_loss: bool
    """Whether the module's last stage computes a loss."""

    def rows_of(self, output: Any) -> torch.Tensor:
        """Turns what the module's last stage returned into rows, sample after sample."""
        ...

    item: ItemShape
    """What the module turns into rows."""

    keeps_parts: bool
    """Whether a rank with a part of each sequence is sent the rows of its part only."""

    def rows_beside_loss(self) -> torch.Tensor | None:
        """Takes rows that the last forward pass of a module with a loss made for another one."""
        ...

    def hidden_of(self, output: Any) -> torch.Tensor:
        """Turns what another stage returned into the hidden state for the next one."""
        ...

    def begin(self, samples: "Sequence[SampleFacts]") -> None:
        """Takes what is known of the samples of the next forward task, in every stage."""
        ...

    def inputs_of(self, received: Mapping[str, torch.Tensor]) -> Any:
        """Turns what a stage received into what ``set_input_tensor`` takes.

        Args:
            received: Rows by the module that made them; or under the module's own name the
                hidden state of the stage before.
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

    def document_stops(self, batch: Batch) -> Sequence[tuple[int, ...]] | None:
        """Finds where the documents of every sample end, and padding begins after the last one.

        Returns:
            The ends, where this module runs under a mask that follows from them.

        Raises:
            HostError: The batch contradicts the mask that the plan asks for.
        """
        ...

    def take_samples(self, batch: Batch, samples: Interval) -> Batch:
        """Cuts samples out of a batch that a loader collated.

        Raises:
            HostError: This cannot be told from the batch.
        """
        ...

    def take_items(self, batch: Batch, items: Sequence[Sequence[int]]) -> Batch:
        """Cuts some items, such as images, out of a batch, and the samples that have any of them.

        Args:
            batch: Whole samples, which a loader collated; or samples that hold just these items.
            items: Items of every sample that are wanted, by their number in the sample.

        Raises:
            HostError: The batch holds other items, or this cannot be told from it.
        """
        ...

    def item_cost(self) -> ItemCost:
        """Tells what the module's items are and what they cost."""
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
        self, groups: ModuleGroups, *, plan: Plan
    ) -> AbstractContextManager[None]:
        """Makes the class build one module only, on that module's groups and sizes.

        Args:
            groups: Groups of the module.
            plan: The plan.

        Raises:
            PlanError: The model has other modules or edges than the plan; raised by the
                constructor.
        """
        ...

    def parts(self, model: torch.nn.Module, name: str) -> Mapping[str, str]:
        """Tells where the parts of a plan's ``trainable`` lie in the built module."""
        ...

    def boundary(self, model: torch.nn.Module, name: str) -> ModuleBoundary:
        """Returns the translator of a built module, which may be wrapped."""
        ...


def facts_of(config: TransformerConfig) -> ModuleFacts:
    """Returns the sizes of a transformer that limit how it can be split."""
    return ModuleFacts(
        num_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups or config.num_attention_heads,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size or 4 * config.hidden_size,
        num_experts=config.num_moe_experts,
        moe_ffn_hidden_size=config.moe_ffn_hidden_size if config.num_moe_experts else None,
    )


@contextmanager
def building_one_module(
    families: Sequence[ModelFamily], groups: ModuleGroups, *, plan: Plan
) -> Iterator[None]:
    """Makes the model class of every family build one module only, whichever the script uses."""
    with ExitStack() as stack:
        for family in families:
            stack.enter_context(family.building_one_module(groups, plan=plan))
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


def check_edges(plan: Plan, *, outputs: Sequence[str] = ()) -> None:
    """Checks that encoders feed the language model, and it feeds the outputs.

    Args:
        plan: The plan.
        outputs: Those of its modules that are outputs.

    Raises:
        PlanError: It has other edges.
    """
    encoders = [name for name in plan.modules if name not in (LANGUAGE, *outputs)]
    legal = [[name, LANGUAGE] for name in encoders] + [[LANGUAGE, name] for name in outputs]
    if sorted(map(list, plan.edges)) != sorted(legal):
        raise PlanError(
            f"edges: edges={[list(edge) for edge in plan.edges]} must be {legal}, as data flows in "
            f"the script's model; change the edges of the plan"
        )


def token_ids(batch: Batch) -> torch.Tensor:
    """Finds the token ids ``[b, s]`` of a batch.

    Raises:
        HostError: They have another name.
    """
    fields = batch_fields(batch)
    tokens = next((fields[key] for key in ("tokens", "input_ids") if key in fields), None)
    if tokens is None:
        raise HostError(
            f"data: batch keys={sorted(fields)} must include 'tokens' or 'input_ids'; "
            f"name the token ids so in the data set"
        )
    return tokens
