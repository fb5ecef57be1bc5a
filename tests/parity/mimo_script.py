"""A training script around ``MimoModel``: images and sounds in any number per sample.

It knows nothing of Mosaic: the same functions train under stock Megatron and under a plan. Every
row of an image or a sound has a token of its own in the text, as MimoModel wants it.
"""

from functools import partial

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.mimo import MimoModel, MimoModelConfig
from megatron.core.models.mimo.submodules.audio import AudioModalitySubmodules
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.models.multimodal.llava_spec import decoder_model_with_local_default_spec
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, get_submodules
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.training import get_args
from megatron.training.arguments import core_transformer_config_from_args
from torch.utils.data import default_collate

from tests.parity import vlm_script
from tests.parity.deep_model import DeepGPT, DeepImages, DeepMimo
from tests.parity.generating_model import TARGET_WIDTH, GeneratingMimo, Generator
from tests.parity.generating_model import loss_func as generating_loss_func

IMAGE, SOUND = -200, -201
LENGTH = 24
IMAGE_ROWS = 4  # 28 x 28 pixels in patches of 14
FRAMES, BANDS = 3, 5


class SoundEncoder(MegatronModule):
    """A small transformer over the frames of a sound."""

    def __init__(self, config, layer_spec, pg_collection=None):
        super().__init__(config=config)
        self.bands = torch.nn.Linear(BANDS, config.hidden_size)
        self.decoder = TransformerBlock(
            config, layer_spec, pre_process=True, post_process=True, pg_collection=pg_collection
        )

    def forward(self, frames):
        hidden = self.bands(frames).transpose(0, 1).contiguous()
        return self.decoder(hidden, attention_mask=None).transpose(0, 1).contiguous()


def _config(*, num_layers, hidden_size=None, heads=None):
    config = core_transformer_config_from_args(get_args())
    config.num_layers = num_layers
    if hidden_size is not None:
        config.hidden_size, config.ffn_hidden_size = hidden_size, 2 * hidden_size
        config.num_attention_heads = config.num_query_groups = heads
        config.kv_channels = hidden_size // heads
    config.sequence_parallel = False
    config.pipeline_model_parallel_size = 1
    return config


def _projection(input_size):
    layers = decoder_model_with_local_default_spec(None, False)
    return ModuleSpec(
        module=MultimodalProjector,
        params={
            "config": _config(num_layers=1),
            "submodules": get_submodules(layers.submodules.mlp),
            "projector_type": "mlp",
            "input_size": input_size,
        },
    )


def _vit(config):
    args = get_args()
    return ModuleSpec(
        module=CLIPViTModel,
        params={
            "transformer_config": config,
            "transformer_layer_spec": get_vit_layer_with_local_spec(),
            "add_class_token": False,
            "img_h": args.img_h,
            "img_w": args.img_w,
            "patch_dim": args.patch_dim,
        },
    )


def _vision(submodules=VisionModalitySubmodules):
    config = _config(num_layers=get_args().encoder_num_layers)
    return ModuleSpec(
        module=submodules,
        submodules={
            "encoders": {"clip": _vit(config)},
            "input_projections": [_projection(config.hidden_size)],
        },
    )


def _audio():
    config = _config(num_layers=1, hidden_size=16, heads=2)
    encoder = ModuleSpec(
        module=SoundEncoder,
        params={"config": config, "layer_spec": get_vit_layer_with_local_spec()},
    )
    return ModuleSpec(
        module=AudioModalitySubmodules,
        submodules={
            "encoders": {"frames": encoder},
            "input_projections": [_projection(config.hidden_size)],
        },
    )


class ChainedImages(VisionModalitySubmodules):
    """Two encoders, whose rows stand one after the other, as upstream combines them."""

    @staticmethod
    def encoder_rows(num_tokens):
        return {"clip": num_tokens // 2, "dino": num_tokens // 2}


class PairedImages(VisionModalitySubmodules):
    """Two encoders of unlike width, whose rows stand side by side."""

    def combine_embeddings(self, embeddings):
        return torch.cat(embeddings, dim=-1)

    @staticmethod
    def encoder_rows(num_tokens):
        return {"clip": num_tokens, "dino": num_tokens}


def _two_encoders(submodules, *, hidden_size, input_size):
    clip = _config(num_layers=get_args().encoder_num_layers)
    dino = _config(num_layers=1, hidden_size=hidden_size, heads=2)
    return ModuleSpec(
        module=submodules,
        submodules={
            "encoders": {"clip": _vit(clip), "dino": _vit(dino)},
            "input_projections": [_projection(input_size)],
        },
    )


class WrongImages(PairedImages):
    """Says something else than its encoders do."""

    @staticmethod
    def encoder_rows(num_tokens):
        return {"clip": num_tokens + 1, "dino": num_tokens + 1}


def _generator():
    return ModuleSpec(module=Generator, submodules={"output_projections": [_projection(32)]})


MODALITIES = {
    "vision": (_vision, IMAGE),
    "audio": (_audio, SOUND),
    "generator": (_generator, None),
    "wrong": (partial(_two_encoders, WrongImages, hidden_size=16, input_size=48), IMAGE),
    "unknown": (
        partial(_two_encoders, VisionModalitySubmodules, hidden_size=32, input_size=32),
        IMAGE,
    ),
    "deep": (partial(_vision, DeepImages), IMAGE),
    "chained": (partial(_two_encoders, ChainedImages, hidden_size=32, input_size=32), IMAGE),
    "paired": (partial(_two_encoders, PairedImages, hidden_size=16, input_size=48), IMAGE),
}


def model_provider(pre_process=True, post_process=True, **unused):
    args = get_args()
    args.seq_length = args.encoder_seq_length = args.decoder_seq_length = LENGTH
    language = core_transformer_config_from_args(args)
    language.num_layers = args.decoder_num_layers
    deep = "deep" in args.modalities
    plain = GeneratingMimo if "generator" in args.modalities else MimoModel
    model = (DeepMimo if deep else plain)(
        MimoModelConfig(
            language_model_spec=ModuleSpec(
                module=DeepGPT if deep else GPTModel,
                params={
                    "config": language,
                    "transformer_layer_spec": get_gpt_layer_local_spec(
                        normalization=args.normalization
                    ),
                    "vocab_size": args.padded_vocab_size,
                    "max_sequence_length": LENGTH,
                    "pre_process": pre_process,
                    "post_process": post_process,
                    "share_embeddings_and_output_weights": args.tie_embeddings,
                    "position_embedding_type": args.position_embedding_type,
                },
            ),
            modality_submodules_spec={name: MODALITIES[name][0]() for name in args.modalities},
            special_token_ids={
                name: token
                for name in args.modalities
                if (token := MODALITIES[name][1]) is not None
            },
        )
    )
    # The stock loop reduces losses and success over it; MimoModel itself has none.
    model.pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    if args.freeze_LM and model.language_model is not None:
        model.language_model.requires_grad_(False)
    for name, submodule in model.modality_submodules.items():
        if name in args.freeze_encoders:
            submodule.encoders.requires_grad_(False)
        if name in args.freeze_modalities:
            submodule.requires_grad_(False)
    return model


class MultimodalSamples(torch.utils.data.Dataset):
    """Random images, sounds and tokens, determined by the index alone."""

    def __init__(self, num_samples, *, args):
        self._num_samples = num_samples
        self._args = args

    def __len__(self):
        return self._num_samples

    def __getitem__(self, index):
        args = self._args
        generator = torch.Generator().manual_seed(1000 + index)
        num_images = (1, 0, 2, 1, 0, 0, 2)[index % 7] if args.modalities != ["audio"] else 0
        image_rows = 2 * IMAGE_ROWS if "chained" in args.modalities else IMAGE_ROWS
        num_sounds = (0, 0, 1, 2, 0)[index % 5] if "audio" in args.modalities else 0
        spans = [[IMAGE] * image_rows] * num_images + [[SOUND] * FRAMES] * num_sounds
        text = torch.randint(0, args.vocab_size, (LENGTH,), generator=generator).tolist()
        spans += [[token] for token in text[: LENGTH - sum(map(len, spans))]]
        order = torch.randperm(len(spans) - 1, generator=generator).tolist()
        tokens = torch.tensor([token for i in [*order, len(spans) - 1] for token in spans[i]])
        # Unequal masks: a mean over tokens then differs from a mean over samples.
        loss_mask = (torch.rand(LENGTH, generator=generator) < 0.2 + 0.1 * (index % 7)).float()
        loss_mask[-1] = 1.0
        return {
            "image": torch.randn(num_images, 3, args.img_h, args.img_w, generator=generator),
            "sound": torch.randn(num_sounds, FRAMES, BANDS, generator=generator),
            "tokens": tokens,
            "labels": torch.randint(0, args.vocab_size, (LENGTH,), generator=generator),
            "loss_mask": loss_mask * (tokens >= 0),
            "targets": torch.randn(LENGTH, TARGET_WIDTH, generator=generator),
            "position_ids": torch.arange(LENGTH),
        }

    @staticmethod
    def collate_fn(samples):
        media = {
            key: torch.cat([sample.pop(key) for sample in samples]) for key in ("image", "sound")
        }
        return default_collate(samples) | media


def train_valid_test_datasets_provider(num_samples):
    return tuple(
        MultimodalSamples(number, args=get_args()) if number else None for number in num_samples
    )


def get_batch(data_iterator):
    """Sends a batch to the tensor-parallel ranks, also one without any image or sound."""
    args = get_args()
    data = next(data_iterator) if data_iterator is not None else None
    media = ("image", "sound")
    if data is not None:
        # broadcast_data cannot send a tensor without elements.
        spare = {key: torch.zeros(1, *data[key].shape[1:]) for key in media}
        data = {**data, **{key: torch.cat([data[key], spare[key]]) for key in media}}
    integers = tensor_parallel.broadcast_data(
        ["tokens", "labels", "position_ids"], data, torch.int64
    )
    floats = tensor_parallel.broadcast_data([*media, "loss_mask", "targets"], data, torch.float32)
    sent = {key: floats[key][:-1].to(args.params_dtype) for key in media}
    return floats | integers | sent


def _modality_inputs(batch):
    image, sound = {"x": batch["image"]}, {"frames": batch["sound"]}
    inputs = {
        "vision": {"clip": image},
        "audio": {"frames": sound},
        "chained": {"clip": image, "dino": image},
        "paired": {"clip": image, "dino": image},
        "deep": {"clip": image},
        "wrong": {"clip": image, "dino": image},
        "unknown": {"clip": image, "dino": image},
        "generator": {"targets": batch["targets"][Generator.takes_hidden_states(batch["tokens"])]},
    }
    present = {name: batch["sound" if name == "audio" else "image"] for name in inputs}
    present["generator"] = batch["targets"]
    return {
        name: inputs[name] if present[name].shape[0] else None for name in get_args().modalities
    }


def forward_step(data_iterator, model):
    batch = get_batch(data_iterator)
    output, loss_mask = model(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        # MimoModel does not use it: the layers are causal.
        attention_mask=torch.zeros(1, 1, LENGTH, LENGTH, dtype=torch.bool),
        loss_mask=batch["loss_mask"],
        labels=batch["labels"],
        modality_inputs=_modality_inputs(batch),
    )
    if "generator" in get_args().modalities:
        return output, partial(generating_loss_func, loss_mask)
    legacy = get_args().legacy_loss
    loss_func = vlm_script.legacy_loss_func if legacy else vlm_script.loss_func
    return output, partial(loss_func, loss_mask)


def add_script_args(parser):
    parser = vlm_script.add_script_args(parser)
    group = parser.add_argument_group(title="modalities")
    group.add_argument("--modalities", nargs="+", choices=tuple(MODALITIES), default=["vision"])
    group.add_argument("--freeze-encoders", nargs="+", default=[])
    group.add_argument("--freeze-modalities", nargs="+", default=[], help="with projections")
    return parser


def main(parse_and_validate_args, pretrain, provider=model_provider):
    """Runs the script with Megatron's two entry functions, or with Mosaic's."""
    vlm_script.run_script(
        parse_and_validate_args,
        pretrain,
        add_script_args=add_script_args,
        datasets_provider=train_valid_test_datasets_provider,
        forward_step=forward_step,
        provider=provider,
    )
