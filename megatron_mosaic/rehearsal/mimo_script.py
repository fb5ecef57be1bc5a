"""A training script around a thin MimoModel with the modules of any plan.

Every module beside the language model is a modality of one small transformer over frames; one
that the language model feeds is a regression from hidden states, with a loss of its own.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.mimo import MimoModel, MimoModelConfig
from megatron.core.models.mimo.submodules.audio import AudioModalitySubmodules
from megatron.core.models.multimodal.llava_spec import decoder_model_with_local_default_spec
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, get_submodules
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.training import get_args
from megatron.training.arguments import core_transformer_config_from_args

from megatron_mosaic.layout.placement import LANGUAGE
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.rehearsal.script import (
    Batch,
    Samples,
    freeze,
    loss_func,
    read_batch,
    rehearsed,
    run_script,
    text_of,
)
from megatron_mosaic.rehearsal.tiny import ITEM_ROWS, VOCABULARY

BANDS = 5  # of a frame
FIRST_TOKEN = -200  # special token of the first encoder; the next have those below it


class FrameEncoder(MegatronModule):
    """A transformer over the frames of an item."""

    def __init__(self, config: Any, layer_spec: Any, pg_collection: Any = None) -> None:
        super().__init__(config=config)
        self.bands = torch.nn.Linear(BANDS, config.hidden_size)
        self.decoder = TransformerBlock(
            config, layer_spec, pre_process=True, post_process=True, pg_collection=pg_collection
        )

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        hidden = self.bands(frames).transpose(0, 1).contiguous()
        return self.decoder(hidden, attention_mask=None).transpose(0, 1).contiguous()


class Regression(AudioModalitySubmodules):
    """Returns the squared error of every token whose hidden state it takes."""

    @staticmethod
    def takes_hidden_states(input_ids: torch.Tensor) -> torch.Tensor:
        """Takes those of every third token of the vocabulary."""
        return input_ids % 3 == 0

    def forward(self, encoder_inputs: Any = None, hidden_states: Any = None) -> Any:
        if hidden_states is None:
            return None
        made = self.project_embeddings([hidden_states], is_input=False)
        return (made - encoder_inputs["targets"]).square().mean(dim=-1)


class RehearsedMimo(MimoModel):
    """Returns what each of its modules returned where one of them has a loss of its own."""

    def __init__(self, config: MimoModelConfig) -> None:
        super().__init__(config)
        self.hidden: Any = None
        if self.language_model is not None:
            self.language_model.decoder.register_forward_hook(self._keep)

    def _keep(self, decoder: Any, inputs: Any, output: torch.Tensor) -> None:
        self.hidden = output

    def forward(self, **batch: Any) -> Any:
        output, loss_mask = super().forward(**batch)
        made = {LANGUAGE: output}
        for name, submodule in self.modality_submodules.items():
            if isinstance(submodule, Regression) and not isinstance(output, dict):
                taken = Regression.takes_hidden_states(batch["input_ids"])
                made[name] = submodule(
                    encoder_inputs=batch["modality_inputs"][name],
                    hidden_states=self.hidden.transpose(0, 1)[taken],
                )
        return (made if len(made) > 1 else output), loss_mask


def _config(num_layers: int) -> Any:
    config = core_transformer_config_from_args(get_args())
    config.num_layers = num_layers
    config.sequence_parallel = False
    config.pipeline_model_parallel_size = 1
    # Only the language model has experts.
    config.num_moe_experts = None
    return config


def _projection() -> ModuleSpec:
    config = _config(1)
    layers = decoder_model_with_local_default_spec(None, False)
    return ModuleSpec(
        module=MultimodalProjector,
        params={
            "config": config,
            "submodules": get_submodules(layers.submodules.mlp),
            "projector_type": "mlp",
            "input_size": config.hidden_size,
        },
    )


def _modality(plan: Plan, name: str, num_layers: int) -> ModuleSpec:
    if name in plan.outputs:
        return ModuleSpec(module=Regression, submodules={"output_projections": [_projection()]})
    encoder = ModuleSpec(
        module=FrameEncoder,
        params={"config": _config(num_layers), "layer_spec": get_vit_layer_with_local_spec()},
    )
    return ModuleSpec(
        module=AudioModalitySubmodules,
        submodules={"encoders": {"frames": encoder}, "input_projections": [_projection()]},
    )


def _inputs(plan: Plan) -> list[str]:
    """Modules that feed the language model."""
    return [name for name in plan.encoders if name not in plan.outputs]


def _token_of(plan: Plan) -> dict[str, int]:
    return {name: FIRST_TOKEN - index for index, name in enumerate(_inputs(plan))}


def model_provider(
    pre_process: bool = True, post_process: bool = True, **unused: Any
) -> torch.nn.Module:
    """Builds what the rank has of the model."""
    args = get_args()
    plan, tiny = rehearsed()
    args.encoder_seq_length = args.decoder_seq_length = args.seq_length
    language = core_transformer_config_from_args(args)
    language.num_layers = tiny.num_layers[LANGUAGE]
    model: Any = RehearsedMimo(
        MimoModelConfig(
            language_model_spec=ModuleSpec(
                module=GPTModel,
                params={
                    "config": language,
                    "transformer_layer_spec": get_gpt_layer_local_spec(
                        num_experts=args.num_experts, normalization=args.normalization
                    ),
                    "vocab_size": args.padded_vocab_size,
                    "max_sequence_length": args.seq_length,
                    "pre_process": pre_process,
                    "post_process": post_process,
                    "position_embedding_type": args.position_embedding_type,
                },
            ),
            modality_submodules_spec={
                name: _modality(plan, name, tiny.num_layers[name]) for name in plan.encoders
            },
            special_token_ids=_token_of(plan),
        )
    )
    # The stock loop reduces losses and success over it; MimoModel itself has none.
    model.pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    freeze(model, plan, _parts(plan))
    return model


def _parts(plan: Plan) -> dict[str, Mapping[str, str]]:
    parts: dict[str, Mapping[str, str]] = {
        LANGUAGE: {
            part: f"language_model.{part}" for part in ("embedding", "decoder", "output_layer")
        }
    }
    for name in plan.encoders:
        path = f"modality_submodules.{name}"
        if name in plan.outputs:
            parts[name] = {"projector": f"{path}.output_projections", "decoder": f"{path}.decoders"}
        else:
            parts[name] = {"encoder": f"{path}.encoders", "projector": f"{path}.input_projections"}
    return parts


def _sample(index: int, *, plan: Plan, length: int) -> Batch:
    """Draws a sample with an item or two of each kind, or none; a token for each of their rows."""
    generator = torch.Generator().manual_seed(1000 + index)
    sample = text_of(generator, index=index, length=length, vocabulary=VOCABULARY)
    counts = {
        name: (1, 0, 2, 1, 0, 0, 2)[(index + 3 * place) % 7]
        for place, name in enumerate(_inputs(plan))
    }
    tokens = _token_of(plan)
    spans = [[tokens[name]] * ITEM_ROWS for name, count in counts.items() for _ in range(count)]
    text = sample["tokens"][: length - sum(map(len, spans))]
    spans += [[token] for token in text.tolist()]
    order = torch.randperm(len(spans) - 1, generator=generator).tolist()
    placed = torch.tensor([token for i in [*order, len(spans) - 1] for token in spans[i]])
    items = {
        name: torch.randn(count, ITEM_ROWS, BANDS, generator=generator)
        for name, count in counts.items()
    }
    width = rehearsed()[1].hidden_size
    targets = {name: torch.randn(length, width, generator=generator) for name in plan.outputs}
    mask = sample["loss_mask"] * (placed >= 0)
    return sample | items | targets | {"tokens": placed, "loss_mask": mask}


def train_valid_test_datasets_provider(num_samples: list[int]) -> tuple[Samples | None, ...]:
    """Makes the data."""
    plan, tiny = rehearsed()
    sample = partial(_sample, plan=plan, length=tiny.text_length)
    return tuple(
        Samples(number, sample, media=_inputs(plan)) if number else None for number in num_samples
    )


def _modality_inputs(plan: Plan, batch: Batch) -> dict[str, Any]:
    inputs: dict[str, Any] = {
        name: {"frames": {"frames": batch[name]}} if batch[name].shape[0] else None
        for name in _inputs(plan)
    }
    for name in plan.outputs:
        taken = Regression.takes_hidden_states(batch["tokens"])
        inputs[name] = {"targets": batch[name][taken]}
    return inputs


def losses_func(loss_mask: torch.Tensor, made: Any) -> tuple[Any, ...]:
    """Adds up the losses of the modules that are there."""
    if not isinstance(made, dict):
        return loss_func(loss_mask, made)
    mask = loss_mask.view(-1).float()
    num_tokens = mask.sum().clone().detach().to(torch.int)
    losses = {
        "lm loss" if name == LANGUAGE else f"{name} loss": torch.sum(output.view(-1).float() * mask)
        if name == LANGUAGE
        else output.float().sum()
        for name, output in made.items()
    }
    report = {
        name: torch.cat([loss.clone().detach().view(1), num_tokens.view(1)])
        for name, loss in losses.items()
    }
    return sum(losses.values()), num_tokens, report


def forward_step(
    data_iterator: Iterator[Batch] | None, model: torch.nn.Module
) -> tuple[Any, Callable[..., Any]]:
    """Runs the model on one batch."""
    plan, tiny = rehearsed()
    media = dict.fromkeys(_inputs(plan), (ITEM_ROWS, BANDS))
    data = next(data_iterator) if data_iterator is not None else None
    batch = read_batch(data, media=media, floats=plan.outputs)
    length = tiny.text_length
    output, loss_mask = model(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        # MimoModel does not use it: the layers are causal.
        attention_mask=torch.zeros(1, 1, length, length, dtype=torch.bool),
        loss_mask=batch["loss_mask"],
        labels=batch["labels"],
        modality_inputs=_modality_inputs(plan, batch),
    )
    return output, partial(losses_func, loss_mask)


def main(
    parse_and_validate_args: Callable[..., Any],
    pretrain: Callable[..., None],
    provider: Callable[..., torch.nn.Module] = model_provider,
) -> None:
    """Runs the script with Megatron's two entry functions, or with Mosaic's."""
    run_script(
        parse_and_validate_args,
        pretrain,
        datasets_provider=train_valid_test_datasets_provider,
        forward_step=forward_step,
        provider=provider,
    )
