"""Rows between the modules of a MimoModel."""

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mosaic.comm.boundary import ONE_ROW
from megatron_mosaic.errors import HostError
from megatron_mosaic.host.families.family import Batch, token_ids
from megatron_mosaic.host.reports import flops_per_token, item_cost
from megatron_mosaic.layout.item_costs import ItemCost
from megatron_mosaic.layout.ownership import Runs
from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.layout.rows import Interval

if TYPE_CHECKING:
    from megatron_mosaic.host.data.facts import SampleFacts
    from megatron_mosaic.host.families.mimo_parts import ModalityPart


class HiddenStates:
    """Keeps what the decoder of a last stage made, and of which tokens, until it is taken.

    Args:
        model: A MimoModel with the last stage of its language model.
    """

    def __init__(self, model: Any) -> None:
        self._group = model.pg_collection.tp
        self._sharded: bool = model.config.sequence_parallel
        self._hidden: torch.Tensor | None = None
        self._input_ids: torch.Tensor | None = None
        model.register_forward_pre_hook(self._keep_tokens, with_kwargs=True)
        model.language_model.decoder.register_forward_hook(self._keep_hidden)

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns hidden states ``[s, b, h]`` and token ids ``[b, s]``, and keeps them no more."""
        hidden, input_ids = self._hidden, self._input_ids
        assert hidden is not None, "the decoder has not run"
        assert input_ids is not None, "the model has not run"
        self._hidden = self._input_ids = None
        if self._sharded:
            # Every rank of the group gets the whole gradient back, and keeps its share.
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self._group
            )
        return hidden, input_ids

    def _keep_tokens(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._input_ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]

    def _keep_hidden(self, decoder: Any, args: Any, output: torch.Tensor) -> None:
        self._hidden = output


class MimoBoundary:
    """Translates between MimoModel's tensors and boundary rows.

    A modality has one row ``[h]`` for each of its special tokens. An encoder that is a module of
    its own has as many as the modality's class says, of its own width. Several tensors with equal
    rows travel side by side as one wide row. To an output go hidden states of the last stage.

    Args:
        model: A built module, unwrapped.
        name: Which one.
        parts: What the plan's modules are of the modalities.
    """

    def __init__(self, model: Any, name: str, *, parts: "Mapping[str, ModalityPart]") -> None:
        self._model = model
        self._name = name
        self._parts = parts
        self._tokens: Mapping[str, int] = model.mimo_config.special_token_ids
        language = model.mimo_config.language_model_spec.params["config"]
        self._hidden_size: int = language.hidden_size
        self.width: int = self._row_width()
        self.item = ONE_ROW
        # MimoModel merges whole sequences and splits them afterwards.
        self.keeps_parts = False
        self.makes_loss = name == LANGUAGE or parts[name].is_output
        self._hidden: HiddenStates | None = None
        if name == LANGUAGE and self._output() is not None and model.post_process:
            self._hidden = HiddenStates(model)

    def rows_of(self, output: Any) -> torch.Tensor:
        """Takes the rows of a modality out of what MimoModel returns for each."""
        if self._name == LANGUAGE:
            return output
        made = output[self._parts[self._name].modality]
        widths = self._output_widths(self._name)
        return made if widths is None else torch.cat([made[key] for key in widths], dim=-1)

    def rows_beside_loss(self) -> torch.Tensor | None:
        """Takes the hidden states that the last forward pass made for an output."""
        output = self._output()
        if self._hidden is None or output is None:
            return None
        hidden, input_ids = self._hidden.take()
        return hidden.transpose(0, 1)[output.hidden_states_taken(input_ids)]

    def hidden_of(self, output: Any) -> torch.Tensor:
        """Takes the hidden state out of what MimoModel returns for each module."""
        key = LANGUAGE if self._name == LANGUAGE else self._parts[self._name].modality
        return output[key]

    def begin(self, samples: "Sequence[SampleFacts]") -> None:
        """Needs to know nothing: MimoModel finds all in the batch."""

    def inputs_of(self, received: Mapping[str, torch.Tensor]) -> Mapping[str, Any]:
        """Returns rows or a hidden state under the names that MimoModel looks for.

        Rows of a modality whose encoders are modules of their own are combined and projected.
        """
        if self._name in received:
            key = LANGUAGE if self._name == LANGUAGE else self._parts[self._name].modality
            return {key: received[self._name]}
        if self._name != LANGUAGE:
            return {self._parts[self._name].modality: received[LANGUAGE]}
        inputs: dict[str, Any] = {}
        for name, part in self._parts.items():
            if part.is_output:
                continue
            if part.whole:
                inputs[part.modality] = self._unpack(name, received[name])
            elif part.modality not in inputs:
                inputs[part.modality] = self._combine(part.modality, received)
        return inputs

    def row_runs(self, batch: Batch) -> Mapping[str, Sequence[Runs]]:
        """Counts the rows of every sample by its tokens; where they belong nobody asks."""
        input_ids = token_ids(batch)
        counts: dict[str, Sequence[int]] = {}
        for name, part in self._parts.items():
            if self._name not in (LANGUAGE, name):
                continue
            if part.is_output:
                counts[LANGUAGE] = part.hidden_states_taken(input_ids).sum(dim=1).tolist()
            else:
                tokens = (input_ids == self._tokens[part.modality]).sum(dim=1).tolist()
                counts[name] = [part.rows_for(number) for number in tokens]
        return {
            name: [(Interval(0, number),) for number in numbers] for name, numbers in counts.items()
        }

    def document_stops(self, batch: Batch) -> None:
        """Returns None: masks that follow from a batch are LLaVAModel's."""
        return None

    def take_samples(self, batch: Batch, samples: Interval) -> Batch:
        """Refuses to cut a batch: what belongs to a sample only the script knows.

        Raises:
            HostError: Always.
        """
        raise HostError(
            "data: loader must be a map-style data set for MimoModel under a plan, of which every "
            "module reads its own samples; return data sets from the provider"
        )

    def take_items(self, batch: Batch, items: Sequence[Sequence[int]]) -> Batch:
        """Leaves a batch of a data set as it is: the rows of a sample are one item.

        Raises:
            HostError: The batch has other samples too.
        """
        if all(items):
            return batch
        return self.take_samples(batch, Interval(0, 0))

    def item_cost(self) -> ItemCost:
        """Tells the cost of a sample's rows, as if they all were of one image."""
        return item_cost([] if self._name == LANGUAGE else self._configs())

    def flops_per_row(self, args: argparse.Namespace, *, trained: Mapping[str, float]) -> float:
        """Counts the operations of encoders and projection behind a row.

        The scores of attention are left out: how many rows attend to each other is the
        encoder's matter.
        """
        if self._name == LANGUAGE:
            return 0.0
        share = max(trained.values(), default=1.0)
        passes = 2 + share if share else 1
        return sum(passes * flops_per_token(config) for config in self._configs())

    def _configs(self) -> list[TransformerConfig]:
        """Configs of the module's transformers, each once."""
        configs = {
            id(module.config): module.config
            for module in self._model.modality_submodules.modules()
            if hasattr(module, "layers") and hasattr(module, "config")
        }
        return list(configs.values())

    def _row_width(self) -> int:
        if self._name == LANGUAGE:
            return self._hidden_size
        widths = self._output_widths(self._name)
        if widths is not None:
            return sum(widths.values())
        part = self._parts[self._name]
        if part.whole:
            return self._hidden_size
        (encoder,) = self._model.modality_submodules[part.modality].encoders.values()
        return encoder.config.hidden_size

    def _output(self) -> "ModalityPart | None":
        return next((part for part in self._parts.values() if part.is_output), None)

    def _output_widths(self, name: str) -> Mapping[str, int] | None:
        return self._parts[name].output_widths(self._hidden_size)

    def _unpack(self, name: str, rows: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        widths = self._output_widths(name)
        if widths is None:
            return rows
        return dict(zip(widths, rows.split(list(widths.values()), dim=-1), strict=True))

    def _combine(self, modality: str, received: Mapping[str, torch.Tensor]) -> torch.Tensor:
        rows = [received[n] for n, part in self._parts.items() if part.modality == modality]
        if not any(each.shape[0] for each in rows):
            return rows[0].new_zeros(0, self.width)
        submodule = self._model.modality_submodules[modality]
        combined = submodule.combine_embeddings(rows)
        return submodule.project_embeddings([combined], is_input=True)
