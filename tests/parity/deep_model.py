"""A MimoModel whose images enter the decoder twice: as tokens, and again behind its first layer.

The second feature is narrower than a token; the language model widens it.
"""

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.mimo import MimoModel
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.utils import unwrap_model

FEATURE_WIDTH = 16


class DeepImages(VisionModalitySubmodules):
    """Returns tokens, and a feature of each of them."""

    @staticmethod
    def output_widths(hidden_size):
        return {"tokens": hidden_size, "feature": FEATURE_WIDTH}

    def forward(self, encoder_inputs=None, hidden_states=None):
        if encoder_inputs is None:
            return None
        encoded = self.combine_embeddings(self.encode(encoder_inputs))
        first, second = encoded.split(FEATURE_WIDTH, dim=-1)
        return {"tokens": self.project_embeddings([encoded]), "feature": first * second}


class DeepGPT(GPTModel):
    """Adds a feature of every position behind its first layer."""

    def __init__(self, **options):
        super().__init__(**options)
        self.feature = None
        if self.pre_process:
            self.widen = torch.nn.Linear(FEATURE_WIDTH, self.config.hidden_size, bias=False)
            self.decoder.layers[0].register_forward_hook(self._inject)

    def _inject(self, layer, inputs, output):
        if self.feature is None:
            return output
        hidden, context = output
        return hidden + self.widen(self.feature), context


class DeepMimo(MimoModel):
    """Hands the second feature of a modality to the language model."""

    def align_embeddings_by_token_positions(
        self, modality_embeddings, input_ids, special_token_ids
    ):
        language, plain = unwrap_model(self.language_model), dict(modality_embeddings)
        language.feature = None
        for name, value in modality_embeddings.items():
            if isinstance(value, dict):
                plain[name] = value["tokens"]
                places = (input_ids == special_token_ids[name]).unsqueeze(-1)
                whole = value["feature"].new_zeros(*input_ids.shape, FEATURE_WIDTH)
                whole = whole.masked_scatter(places.expand_as(whole), value["feature"])
                language.feature = whole.transpose(0, 1)
        return super().align_embeddings_by_token_positions(plain, input_ids, special_token_ids)

    def _forward_all_modules(
        self, input_ids, position_ids, attention_mask, loss_mask, labels, modality_inputs, *unused
    ):
        """Upstream's reads the shape of what a modality returns, and a dict has none."""
        made = {
            name: self.modality_submodules[name](encoder_inputs=inputs)
            for name, inputs in modality_inputs.items()
            if inputs is not None
        }
        return self._forward_language_module(input_ids, position_ids, None, loss_mask, labels, made)
