"""Rows between the modules of a MimoModel."""

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from megatron_mosaic.host.families.family import Batch, token_ids
from megatron_mosaic.host.reports import flops_per_token
from megatron_mosaic.layout.placement import LANGUAGE

if TYPE_CHECKING:
    from megatron_mosaic.host.families.mimo import ModalityPart


class MimoBoundary:
    """Translates between MimoModel's tensors and boundary rows.

    A modality has one row ``[h]`` for each of its special tokens. An encoder that is a module of
    its own has as many as ``encoder_rows`` of the modality's class says, of its own width. A
    modality whose class has ``output_widths`` returns a dict of tensors with equal rows, which
    travel side by side as one wide row.

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
        self.width: int = self._row_width()

    def rows_of(self, output: Any) -> torch.Tensor:
        """Takes the rows of a modality out of what MimoModel returns for each."""
        if self._name == LANGUAGE:
            return output
        made = output[self._parts[self._name].modality]
        widths = self._output_widths(self._name)
        return made if widths is None else torch.cat([made[key] for key in widths], dim=-1)

    def hidden_of(self, output: Any) -> torch.Tensor:
        """Takes the hidden state out of what MimoModel returns for each module."""
        key = LANGUAGE if self._name == LANGUAGE else self._parts[self._name].modality
        return output[key]

    def inputs_of(self, received: Mapping[str, torch.Tensor]) -> Mapping[str, Any]:
        """Returns rows or a hidden state under the names that MimoModel looks for.

        Rows of a modality whose encoders are modules of their own are combined and projected.
        """
        if self._name in received:
            key = LANGUAGE if self._name == LANGUAGE else self._parts[self._name].modality
            return {key: received[self._name]}
        inputs: dict[str, Any] = {}
        for name, part in self._parts.items():
            if part.whole:
                inputs[part.modality] = self._unpack(name, received[name])
            elif part.modality not in inputs:
                inputs[part.modality] = self._combine(part.modality, received)
        return inputs

    def row_counts(self, batch: Batch) -> Mapping[str, Sequence[int]]:
        """Counts the rows of every sample by its special tokens."""
        names = self._parts if self._name == LANGUAGE else [self._name]
        return {name: self._rows_of_samples(name, batch) for name in names}

    def flops_per_row(self, args: argparse.Namespace) -> float:
        """Counts the operations of encoders and projection behind a row.

        The scores of attention are left out: how many rows attend to each other is the
        encoder's matter.
        """
        if self._name == LANGUAGE:
            return 0.0
        configs = {
            id(module.config): module.config
            for module in self._model.modality_submodules.modules()
            if hasattr(module, "layers") and hasattr(module, "config")
        }
        return sum(3.0 * flops_per_token(config) for config in configs.values())

    def _row_width(self) -> int:
        language = self._model.mimo_config.language_model_spec.params["config"]
        if self._name == LANGUAGE:
            return language.hidden_size
        widths = self._output_widths(self._name)
        if widths is not None:
            return sum(widths.values())
        if self._parts[self._name].whole:
            return language.hidden_size
        (encoder,) = self._encoders().values()
        return encoder.config.hidden_size

    def _output_widths(self, name: str) -> Mapping[str, int] | None:
        """Returns the tensors that a module makes, with their widths; None if it makes one."""
        config, part = self._model.mimo_config, self._parts[name]
        declared = getattr(
            config.modality_submodules_spec[part.modality].module, "output_widths", None
        )
        if declared is None or not part.whole:
            return None
        return declared(config.language_model_spec.params["config"].hidden_size)

    def _unpack(self, name: str, rows: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        widths = self._output_widths(name)
        if widths is None:
            return rows
        return dict(zip(widths, rows.split(list(widths.values()), dim=-1), strict=True))

    def _encoders(self) -> Mapping[str, Any]:
        modality = self._parts[self._name].modality
        return dict(self._model.modality_submodules[modality].encoders.items())

    def _combine(self, modality: str, received: Mapping[str, torch.Tensor]) -> torch.Tensor:
        rows = [received[n] for n, part in self._parts.items() if part.modality == modality]
        if not any(each.shape[0] for each in rows):
            return rows[0].new_zeros(0, self.width)
        submodule = self._model.modality_submodules[modality]
        combined = submodule.combine_embeddings(rows)
        return submodule.project_embeddings([combined], is_input=True)

    def _rows_of_samples(self, name: str, batch: Batch) -> list[int]:
        part = self._parts[name]
        tokens = token_ids(batch) == self._tokens[part.modality]
        counts: list[int] = tokens.sum(dim=1).tolist()
        if part.whole:
            return counts
        rows_by_encoder = self._model.mimo_config.modality_submodules_spec[
            part.modality
        ].module.encoder_rows
        (encoder,) = part.encoders
        return [rows_by_encoder(count)[encoder] for count in counts]
