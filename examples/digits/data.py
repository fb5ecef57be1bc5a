"""Scikit-learn's handwritten digits as samples of an image and a text.

A sample is the image of a digit followed by its English name in letters. Everything in it
follows from its index alone, so ranks that read different parts of a batch agree on it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = "".join(sorted(set("".join(NAMES))))
PAD, BEGIN, END, FIRST_LETTER = range(4)
VOCAB_SIZE = FIRST_LETTER + len(LETTERS)
# The image's token, BEGIN and the letters; labels are one token ahead, so END needs no room.
TEXT_LENGTH = 2 + max(map(len, NAMES))
NUM_HELD_OUT = 360

_SPLIT_SEED = 0
# Standard deviation of the noise on training images, whose pixels go from -1 to 1: with it the
# model does not learn the 1437 images by heart.
_NOISE = 0.3

Sample = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Digits:
    """Images ``[n, 3, 8, 8]`` from -1 (paper) to 1 (ink), and the digits they show ``[n]``."""

    images: torch.Tensor
    digits: np.ndarray


def load_split() -> tuple[Digits, Digits]:
    """Loads the images for training and the held-out ones, always the same."""
    bunch = load_digits()
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(bunch.target))
    # 16 is the darkest gray; the vision model wants three channels.
    images = torch.from_numpy(bunch.images / 8 - 1).float().unsqueeze(1).repeat(1, 3, 1, 1)
    training, held_out = order[NUM_HELD_OUT:], order[:NUM_HELD_OUT]
    return (
        Digits(images=images[training], digits=bunch.target[training]),
        Digits(images=images[held_out], digits=bunch.target[held_out]),
    )


class NamedDigits(torch.utils.data.Dataset):
    """Noisy training images with their names, in another order in every epoch.

    Args:
        training: Images and their digits.
        num_samples: Samples of all epochs together.
        seed: Seed of orders and noise.
        text_length: Tokens of a sample, padding included.
        image_token: Token that stands for the image.
    """

    def __init__(
        self, training: Digits, *, num_samples: int, seed: int, text_length: int, image_token: int
    ) -> None:
        self._training = training
        self._num_samples = num_samples
        self._seed = seed
        self._texts = _texts(text_length=text_length, image_token=image_token)
        num_images = len(training.digits)
        orders = np.random.default_rng(seed)
        num_epochs = math.ceil(num_samples / num_images)
        self._order = np.stack([orders.permutation(num_images) for _ in range(num_epochs)]).ravel()

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Sample:
        picked = self._order[index]
        image = self._training.images[picked]
        noise = np.random.default_rng((self._seed, index)).standard_normal(image.shape[1:])
        return {
            "image": image + _NOISE * torch.from_numpy(noise).float(),
            "is_name": torch.tensor(1),
            **self._texts[self._training.digits[picked]],
        }


class CandidateNames(torch.utils.data.Dataset):
    """Held-out images, each with all ten names one after the other.

    The name that a model finds the most probable is its answer; ``is_name`` marks the right one.

    Args:
        held_out: Images and their digits.
        num_samples: Samples of all evaluations together; after the last image the first follows.
        text_length: Tokens of a sample, padding included.
        image_token: Token that stands for the image.
    """

    def __init__(
        self, held_out: Digits, *, num_samples: int, text_length: int, image_token: int
    ) -> None:
        self._held_out = held_out
        self._num_samples = num_samples
        self._texts = _texts(text_length=text_length, image_token=image_token)

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Sample:
        image, candidate = divmod(index, len(NAMES))
        image %= len(self._held_out.digits)
        return {
            "image": self._held_out.images[image],
            "is_name": torch.tensor(int(candidate == self._held_out.digits[image])),
            **self._texts[candidate],
        }


def _texts(*, text_length: int, image_token: int) -> list[Sample]:
    """The ten names as tokens, labels, positions and loss mask, each ``[text_length]``.

    Raises:
        ValueError: The longest name does not fit.
    """
    if text_length < TEXT_LENGTH:
        raise ValueError(
            f"digits: seq_length={text_length} must be >= {TEXT_LENGTH}, the image's token, a "
            f"begin token and the longest name; give --seq-length {TEXT_LENGTH}"
        )
    return [_text(name, text_length=text_length, image_token=image_token) for name in NAMES]


def _text(name: str, *, text_length: int, image_token: int) -> Sample:
    letters = [FIRST_LETTER + LETTERS.index(letter) for letter in name]
    written = [image_token, BEGIN, *letters, END]
    padded = torch.tensor(written + [PAD] * (text_length + 1 - len(written)))
    # The image's token predicts nothing, BEGIN the first letter, the last letter END.
    loss_mask = torch.zeros(text_length)
    loss_mask[1 : len(written) - 1] = 1.0
    return {
        "tokens": padded[:-1],
        "labels": padded[1:],
        "position_ids": torch.arange(text_length),
        "loss_mask": loss_mask,
    }
