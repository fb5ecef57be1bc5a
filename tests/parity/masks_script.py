"""The script of ``vlm_script`` under attention masks, which without a plan it makes itself.

Under a plan it says nothing of masks: they follow from the batch. Stock Megatron gets them dense.
"""

from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from megatron.core.models.multimodal.llava_model import DEFAULT_IMAGE_TOKEN_INDEX
from megatron.core.models.vision.clip_vit_model import get_num_image_embeddings
from megatron.core.utils import unwrap_model
from megatron.training import get_args

from megatron_mosaic.rehearsal.masks import PACKED, dense_masks, document_ids, image_places
from tests.parity import vlm_script
from tests.parity.vlm_script import ImageTextSamples, loss_func, model_provider, run_script


class MaskedSamples(ImageTextSamples):
    """Samples with images where a mask may have them, packed in documents where it asks for it."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        args = get_args()
        generator = torch.Generator().manual_seed(5000 + index)
        num_images = int((sample["tokens"] == DEFAULT_IMAGE_TOKEN_INDEX).sum())
        tokens = torch.randint(0, self._vocab, (self._length,), generator=generator)
        tokens[_places(args.mask, index, num_images, self._length)] = DEFAULT_IMAGE_TOKEN_INDEX
        is_text = tokens != DEFAULT_IMAGE_TOKEN_INDEX
        sample |= {"tokens": tokens, "loss_mask": sample["loss_mask"] * is_text}
        if args.mask == PACKED:
            ids = torch.tensor(document_ids(index, self._length))
            if args.damaged_batch == "documents_backwards" and index % 3 == 1:
                ids = ids.flip(0)
            sample |= {"document_ids": ids, "loss_mask": sample["loss_mask"] * (ids >= 0)}
            if args.damaged_batch == "no_documents":
                del sample["document_ids"]
        return sample


def _places(mask, index, num_images, length):
    places = image_places(mask, index=index, num_images=num_images, length=length)
    return [place + (get_args().damaged_batch == "text_first") for place in places]


def train_valid_test_datasets_provider(num_samples):
    args = get_args()
    images_of = vlm_script.IMAGES_OF[args.images]
    return tuple(
        MaskedSamples(number, args=args, images_of=images_of) if number else None
        for number in num_samples
    )


def _dense_masks(tokens, ids):
    args = get_args()
    rows = get_num_image_embeddings(
        args.img_h, args.img_w, args.patch_dim, "clip", True, 1, False, False
    )
    return dense_masks(tokens, ids, mask=args.mask, rows=rows, max_length=args.decoder_seq_length)


def patch_positions(tokens):
    """Positions of M-RoPE ``[3, b, s]`` token by token, for images of 2 by 2 patches."""
    samples = []
    for sample in tokens.tolist():
        own, after = [], 0
        for token in sample:
            if token != DEFAULT_IMAGE_TOKEN_INDEX:
                own.append((after,) * 3)
                after += 1
                continue
            own += [(after, after + row, after + column) for row in (0, 1) for column in (0, 1)]
            after += 2
        samples.append(own)
    longest = max(map(len, samples))
    padded = [own + [(0, 0, 0)] * (longest - len(own)) for own in samples]
    return torch.tensor(padded).permute(2, 0, 1)


@contextmanager
def counting_patches(model, tokens):
    """Gives stock LLaVAModel's language model the positions that M-RoPE wants and it does not."""

    def with_positions(_, args, kwargs):
        return args, kwargs | {"position_ids": patch_positions(tokens)}

    language = unwrap_model(model).language_model
    hook = language.register_forward_pre_hook(with_positions, with_kwargs=True)
    yield
    hook.remove()


def forward_step(data_iterator, model):
    args = get_args()
    data = next(data_iterator) if data_iterator is not None else None
    ids = None if data is None else data.get("document_ids")
    batch = vlm_script.get_batch(None if data is None else iter([data]))
    is_stock = not hasattr(args, "mosaic_plan")
    mask, positions = None, nullcontext()
    if is_stock:
        each = [None] * len(batch["tokens"]) if ids is None else ids
        mask = _dense_masks(batch["tokens"], each)
    if is_stock and args.position_embedding_type == "mrope":
        positions = counting_patches(model, batch["tokens"])
    with positions:
        output, loss_mask = model(
            batch["image"],
            batch["tokens"],
            batch["position_ids"],
            mask,
            batch["labels"],
            batch["loss_mask"],
        )
    return output, partial(loss_func, loss_mask)


def add_script_args(parser):
    parser = vlm_script.add_script_args(parser)
    parser.add_argument("--mask", required=True)
    parser.add_argument(
        "--damaged-batch", choices=("text_first", "documents_backwards", "no_documents")
    )
    return parser


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
