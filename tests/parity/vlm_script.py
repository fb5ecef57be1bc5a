"""A training script in the form of ``pretrain_vlm.py``, with any number of images per sample.

It knows nothing of Mosaic: the same functions train under stock Megatron and under a plan.
"""

import warnings
from functools import partial

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.models.multimodal.llava_model import DEFAULT_IMAGE_TOKEN_INDEX, LLaVAModel
from megatron.core.models.multimodal.llava_spec import decoder_model_with_local_default_spec
from megatron.core.models.vision.clip_vit_model import get_num_image_embeddings
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.transformer.spec_utils import get_submodules
from megatron.training import get_args
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import core_transformer_config_from_args
from torch.utils.data import default_collate

from tests.parity.adapters import add_adapters, train_only

MAX_IMAGES = {"one": 2, "two": 2, "ragged": 2, "sparse": 2, "many": 5}


def model_provider(pre_process=True, post_process=True, **unused):
    args = get_args()
    rows = get_num_image_embeddings(
        args.img_h, args.img_w, args.patch_dim, "clip", True, 1, False, False
    )
    args.seq_length = args.encoder_seq_length = rows
    longest = args.text_length + MAX_IMAGES[args.images] * (rows - 1)
    args.decoder_seq_length = -(-longest // args.length_multiple) * args.length_multiple
    args.max_position_embeddings = max(args.max_position_embeddings, args.decoder_seq_length)
    language = core_transformer_config_from_args(args)
    language.num_layers = args.decoder_num_layers
    vision = core_transformer_config_from_args(args)
    vision.num_layers = args.encoder_num_layers
    vision.vision_model_type = "clip"
    projection = core_transformer_config_from_args(args)
    for config in (vision, projection):
        config.sequence_parallel = False
        config.pipeline_model_parallel_size = 1
    dense_spec = decoder_model_with_local_default_spec(None, False)
    language_spec = decoder_model_with_local_default_spec(args.num_experts, False)
    model = LLaVAModel(
        language_transformer_config=language,
        language_transformer_layer_spec=language_spec,
        language_vocab_size=args.padded_vocab_size,
        language_max_sequence_length=args.decoder_seq_length,
        vision_transformer_config=vision,
        vision_transformer_layer_spec=get_vit_layer_with_local_spec(),
        drop_vision_class_token=True,
        vision_projection_config=projection,
        vision_projection_layer_spec=get_submodules(dense_spec.submodules.mlp),
        vision_projection_type="mlp",
        parallel_output=True,
        share_embeddings_and_output_weights=args.tie_embeddings,
        language_position_embedding_type=args.position_embedding_type,
        language_rotary_percent=args.rotary_percent,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        add_encoder=parallel_state.is_pipeline_first_stage(),
        add_decoder=True,
        img_h=args.img_h,
        img_w=args.img_w,
        patch_dim=args.patch_dim,
    )
    model.freeze(
        freeze_language_model=args.freeze_LM,
        freeze_vision_model=args.freeze_ViT,
        freeze_vision_projection=args.freeze_projection,
    )
    blocks = {"vision": model.vision_model, "language": model.language_model}
    for name in args.lora:
        if blocks[name] is not None:
            add_adapters(blocks[name].decoder)
    if args.train:
        train_only(model, args.train)
    return model


class ImageTextSamples(torch.utils.data.Dataset):
    """Random images and tokens, determined by the index alone.

    Args:
        images_of: Number of images of a sample, from its index.
    """

    def __init__(self, num_samples, *, args, images_of):
        self._num_samples = num_samples
        self._shape = (3, args.img_h, args.img_w)
        self._vocab = args.vocab_size
        self._length = args.text_length
        self._images_of = images_of
        self._damaged = args.damaged_sample

    def __len__(self):
        return self._num_samples

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(1000 + index)
        num_images = self._images_of(index)
        tokens = torch.randint(0, self._vocab, (self._length,), generator=generator)
        places = torch.randperm(self._length - 1, generator=generator)[:num_images]
        tokens[places] = DEFAULT_IMAGE_TOKEN_INDEX
        # Unequal masks: a mean over tokens then differs from a mean over samples.
        loss_mask = (
            torch.rand(self._length, generator=generator) < 0.2 + 0.1 * (index % 7)
        ).float()
        loss_mask[-1] = 1.0
        labels = torch.randint(0, self._vocab, (self._length,), generator=generator)
        return {
            "image": torch.randn(
                num_images + (index == self._damaged), *self._shape, generator=generator
            ),
            "tokens": tokens,
            "labels": labels,
            "loss_mask": loss_mask * (tokens != DEFAULT_IMAGE_TOKEN_INDEX),
            "position_ids": torch.arange(self._length),
        }

    @staticmethod
    def collate_fn(samples):
        images = torch.cat([sample.pop("image") for sample in samples])
        return default_collate(samples) | {"image": images}


IMAGES_OF = {
    "one": lambda index: 1,
    "two": lambda index: 2,
    "ragged": lambda index: (1, 0, 2, 1, 0, 0, 2)[index % 7],
    "many": lambda index: (5, 0, 3, 1, 4)[index % 5],
    # Whole microbatches without an image.
    "sparse": lambda index: 2 if index % 8 == 3 else 0,
}


def train_valid_test_datasets_provider(num_samples):
    args = get_args()
    return tuple(
        ImageTextSamples(number, args=args, images_of=IMAGES_OF[args.images]) if number else None
        for number in num_samples
    )


def get_batch(data_iterator):
    """Sends a batch to the tensor-parallel ranks, also one without any image."""
    args = get_args()
    data = next(data_iterator) if data_iterator is not None else None
    if data is not None:
        # broadcast_data cannot send a tensor without elements.
        spare = torch.zeros(1, 3, args.img_h, args.img_w)
        data = {**data, "image": torch.cat([data["image"], spare])}
    integers = tensor_parallel.broadcast_data(
        ["tokens", "labels", "position_ids"], data, torch.int64
    )
    floats = tensor_parallel.broadcast_data(["image", "loss_mask"], data, torch.float32)
    images = floats["image"][:-1].to(args.params_dtype)
    return integers | {"image": images, "loss_mask": floats["loss_mask"]}


def loss_func(loss_mask, output_tensor):
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output_tensor.view(-1).float() * mask)
    num_tokens = mask.sum().clone().detach().to(torch.int)
    report = torch.cat([loss.clone().detach().view(1), num_tokens.view(1)])
    return loss, num_tokens, {"lm loss": report}


def evaluation_loss_func(loss_mask, output_tensor):
    """Reports more than the training loss does, as scripts may."""
    loss, num_tokens, report = loss_func(loss_mask, output_tensor)
    squares = torch.sum(output_tensor.view(-1).float().square() * loss_mask.view(-1).float())
    squared = torch.stack([squares.detach(), num_tokens.float()])
    return loss, num_tokens, report | {"squared loss": squared}


def legacy_loss_func(loss_mask, output_tensor):
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output_tensor.view(-1).float() * mask) / mask.sum()
    return loss, {"lm loss": loss.detach().clone()}


def forward_step(data_iterator, model):
    args = get_args()
    batch = get_batch(data_iterator)
    output, loss_mask = model(
        batch["image"],
        batch["tokens"],
        batch["position_ids"],
        None,
        batch["labels"],
        batch["loss_mask"],
    )
    if not model.training or args.curr_iteration == args.report_more_at:
        return output, partial(evaluation_loss_func, loss_mask)
    return output, partial(legacy_loss_func if args.legacy_loss else loss_func, loss_mask)


def add_script_args(parser):
    group = parser.add_argument_group(title="script")
    group.add_argument("--freeze-LM", action="store_true")
    group.add_argument("--freeze-ViT", action="store_true")
    group.add_argument("--freeze-projection", action="store_true")
    group.add_argument("--tie-embeddings", action="store_true")
    group.add_argument("--lora", nargs="+", choices=("vision", "language"), default=())
    group.add_argument("--train", nargs="+", help="freeze all but parameters of such names")
    group.add_argument("--damaged-sample", type=int, help="it has an image without a token")
    group.add_argument("--report-more-at", type=int, help="a step that reports another loss")
    group.add_argument("--legacy-loss", action="store_true")
    group.add_argument("--disable-vision-class-token", action="store_true")
    group.add_argument("--text-length", type=int, default=8, help="image tokens included")
    group.add_argument("--length-multiple", type=int, default=8, help="of whole sequences")
    group.add_argument("--images", choices=tuple(IMAGES_OF), default="ragged")
    return parser


def run_script(
    parse_and_validate_args,
    pretrain,
    *,
    add_script_args,
    datasets_provider,
    forward_step,
    provider,
):
    """Runs the functions of a script with Megatron's two entry functions, or with Mosaic's."""
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


def main(parse_and_validate_args, pretrain, provider=model_provider):
    """Runs the script with Megatron's two entry functions, or with Mosaic's."""
    run_script(
        parse_and_validate_args,
        pretrain,
        add_script_args=add_script_args,
        datasets_provider=train_valid_test_datasets_provider,
        forward_step=forward_step,
        provider=provider,
    )
