"""A MimoModel with an output: a regression from the hidden states of some tokens."""

import torch
from megatron.core.models.mimo import MimoModel
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules

TARGET_WIDTH = 32


class Generator(VisionModalitySubmodules):
    """Returns the squared error of every token whose hidden state it takes."""

    @staticmethod
    def takes_hidden_states(input_ids):
        return input_ids % 3 == 0

    def forward(self, encoder_inputs=None, hidden_states=None):
        if hidden_states is None:
            return None
        made = self.project_embeddings([hidden_states], is_input=False)
        return (made - encoder_inputs["targets"]).square().mean(dim=-1)


class GeneratingMimo(MimoModel):
    """Returns what each of its modules returned, of those that are there."""

    def __init__(self, config):
        super().__init__(config)
        self.hidden = None
        if self.language_model is not None:
            self.language_model.decoder.register_forward_hook(self._keep)

    def _keep(self, decoder, inputs, output):
        self.hidden = output

    def forward(self, **batch):
        output, loss_mask = super().forward(**batch)
        if isinstance(output, dict):
            return output, loss_mask
        made = {"language": output}
        if "generator" in self.modality_submodules:
            taken = Generator.takes_hidden_states(batch["input_ids"])
            made["generator"] = self.modality_submodules["generator"](
                encoder_inputs=batch["modality_inputs"]["generator"],
                hidden_states=self.hidden.transpose(0, 1)[taken],
            )
        return made, loss_mask


def loss_func(loss_mask, made):
    """Adds up the losses of the modules that are there."""
    mask = loss_mask.view(-1).float()
    num_tokens = mask.sum().clone().detach().to(torch.int)
    losses = {}
    if "language" in made:
        losses["lm loss"] = torch.sum(made["language"].view(-1).float() * mask)
    if "generator" in made:
        losses["generator loss"] = made["generator"].float().sum()
    report = {
        name: torch.cat([loss.clone().detach().view(1), num_tokens.view(1)])
        for name, loss in losses.items()
    }
    return sum(losses.values()), num_tokens, report
