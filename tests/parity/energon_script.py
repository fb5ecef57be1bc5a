"""The script of ``vlm_script.py``, with Megatron Energon's loaders of real handwritten digits.

Its provider has the form of upstream's ``examples/multimodal/dataloader_provider.py``: it shards by
the data-parallel rank of ``parallel_state`` and knows nothing of Mosaic.
"""

from itertools import chain
from pathlib import Path

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.models.multimodal.llava_model import DEFAULT_IMAGE_TOKEN_INDEX
from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    RepeatDataset,
    WorkerConfig,
    basic_sample_keys,
    get_loader,
    get_savable_loader,
    get_train_dataset,
    get_val_dataset,
    stateless,
)
from megatron.training import get_args
from megatron.training.checkpointing import get_checkpoint_name

from tests.parity import vlm_script

SHARD_SAMPLES = 20

TEXT_LENGTH = 8


def write_shards(folder: Path, *, num_samples: int) -> None:
    """Writes digits as a WebDataset with none to two images a sample, and prepares it."""
    from click.testing import CliRunner
    from megatron.energon.tools.prepare import command
    from sklearn.datasets import load_digits
    from webdataset import ShardWriter

    from examples.digits.data import NAMES

    bunch = load_digits()
    images = (bunch.images / 8 - 1).astype(np.float32)
    with ShardWriter(f"{folder}/digits-%03d.tar", maxcount=SHARD_SAMPLES, verbose=0) as shards:
        for index in range(num_samples):
            shown = slice(2 * index, 2 * index + (1, 0, 2, 1, 0, 0, 2)[index % 7])
            name = "".join(NAMES[digit] for digit in bunch.target[shown]) or "nothing"
            shards.write({"__key__": f"{index:04d}", "npy": images[shown], "txt": name})
    options = ["--non-interactive", "--no-progress", "--num-workers", "1"]
    splits = ["--split-ratio", "8,2,0", "--sample-type", "CrudeWebdataset"]
    prepared = CliRunner().invoke(command, [str(folder), *options, *splits])
    assert prepared.exit_code == 0, prepared.output


@stateless
def _cook(sample: dict) -> dict:
    return {**basic_sample_keys(sample), "pixels": sample["npy"], "name": sample["txt"]}


class DigitsEncoder(DefaultTaskEncoder):
    cookers = (Cooker(_cook),)

    @stateless
    def encode_sample(self, sample: dict) -> dict:
        args = get_args()
        pixels = torch.as_tensor(sample["pixels"]).unsqueeze(1)
        size = (args.img_h, args.img_w)
        images = torch.nn.functional.interpolate(pixels, size) if len(pixels) else pixels
        letters = [1 + ord(letter) - ord("a") for letter in sample["name"]]
        written = [DEFAULT_IMAGE_TOKEN_INDEX] * len(pixels) + letters
        text = torch.tensor((written + [0] * TEXT_LENGTH)[: TEXT_LENGTH + 1])
        tokens = text[:-1]
        return {
            **basic_sample_keys(sample),
            "image": images.reshape(-1, 1, *size).expand(-1, 3, -1, -1),
            "tokens": tokens,
            "labels": text[1:].clamp(min=0),
            "loss_mask": (tokens > 0).float(),
            "position_ids": torch.arange(TEXT_LENGTH),
        }

    @stateless
    def batch(self, samples: list[dict]) -> dict:
        stacked = ("tokens", "labels", "loss_mask", "position_ids")
        return {
            "__key__": [sample["__key__"] for sample in samples],
            "image": torch.cat([sample["image"] for sample in samples]),
            **{name: torch.stack([sample[name] for sample in samples]) for name in stacked},
        }


class EnergonLoader:
    """Goes on with the loader's data in a new epoch, and knows how to save its state."""

    def __init__(self, loader):
        self._loader = loader
        self._iterator = chain.from_iterable(iter(lambda: loader, None))

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._iterator)

    def save_state(self):
        return self._loader.save_state_rank()


class OneEpochLoader(EnergonLoader):
    def __init__(self, loader):
        super().__init__(loader)
        self._iterator = iter(loader)


def loaders_provider(num_samples):
    """Builds loaders where the first tensor-parallel rank of an end of the pipeline is."""
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    at_end = parallel_state.get_pipeline_model_parallel_rank() in (0, stages - 1)
    if parallel_state.get_tensor_model_parallel_rank() != 0 or not at_end:
        return None, None, None
    return _loaders(
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
        parallel_state.get_data_parallel_group(),
    )


def default_config_provider(num_samples):
    """Leaves it to Energon to find its rank in the data-parallel group."""
    group = parallel_state.get_data_parallel_group()
    config = WorkerConfig.default_worker_config(get_args().num_workers, group)
    return _loaders(config.rank, config.world_size, group)


def _loaders(rank, world_size, group=None):
    args = get_args()
    config = WorkerConfig(
        rank=rank,
        world_size=world_size,
        num_workers=args.num_workers,
        data_parallel_group=group,
    )
    common = {"batch_size": args.micro_batch_size, "worker_config": config}
    training = get_train_dataset(
        args.energon_data,
        task_encoder=DigitsEncoder(),
        shuffle_buffer_size=8,
        max_samples_per_sequence=8,
        repeat=not args.one_epoch,
        **common,
    )
    train = get_savable_loader(training)
    _restore(train, rank)
    valid = get_val_dataset(args.energon_data, task_encoder=DigitsEncoder(), **common)
    repeated = RepeatDataset(valid, worker_config=config)
    kind = OneEpochLoader if args.one_epoch else EnergonLoader
    return kind(train), [EnergonLoader(get_loader(repeated))], None


def _restore(loader, rank):
    """Restores as upstream's example does: it goes on with a message if that fails."""
    args = get_args()
    if args.load is None or args.dataloader_save is None:
        return
    name = f"train_dataloader_dprank{rank:03d}.pt"
    path = get_checkpoint_name(args.dataloader_save, args.iteration, pipeline_rank=0, basename=name)
    try:
        state = torch.load(path, map_location="cpu", weights_only=args.weights_only)
        loader.restore_state_rank(state["dataloader_state_dict"])
    except Exception as error:  # noqa: BLE001
        print(f"loading dataset state failed. Skipping. {error}")


class _InterleavedReplicas(torch.utils.data.IterableDataset):
    """What several replicas read, in the order of their global microbatches."""

    def __init__(self, loaders):
        self._loaders = loaders

    def __iter__(self):
        while True:
            for loader in self._loaders:
                yield next(loader)


def replicas_provider(num_samples):
    """Reads in one process what the replicas of a language model read."""
    replicas = get_args().replicas
    trains, valids, _ = zip(*(_loaders(rank, replicas) for rank in range(replicas)), strict=True)
    return _InterleavedReplicas(trains), _InterleavedReplicas([each[0] for each in valids]), None


def add_script_args(parser):
    vlm_script_args(parser)
    group = parser.add_argument_group(title="energon")
    group.add_argument("--energon-data", required=True)
    group.add_argument("--dataloader-save")
    group.add_argument("--weights-only", action="store_true", help="as torch.load does by itself")
    group.add_argument("--one-epoch", action="store_true")
    group.add_argument("--replicas", type=int, help="of the run to compare with")
    return parser


vlm_script_args = vlm_script.add_script_args


def use(provider):
    """Makes the script of this process read with a provider of this file."""
    vlm_script.add_script_args = add_script_args
    vlm_script.train_valid_test_datasets_provider = provider
