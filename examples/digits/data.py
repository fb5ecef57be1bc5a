"""Scikit-learn's handwritten digits as samples of images and texts.

A sample is the image of a digit followed by its English name in letters. Everything in it
follows from its index alone, so that ranks which read different shares of a batch agree on it.
"""

from collections.abc import Mapping

import numpy as np
import torch
from sklearn.datasets import load_digits

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = "".join(sorted(set("".join(NAMES))))
PAD, BEGIN, END = 0, 1, 2
VOCAB_SIZE = 3 + len(LETTERS)
# A sample holds one token for the image, BEGIN, and the letters; its labels are one token ahead.
TEXT_LENGTH = 2 + max(map(len, NAMES))
IMAGE_SIZE = 8
NUM_HELD_OUT = 360

_SPLIT_SEED = 0

Sample = Mapping[str, torch.Tensor]


class TrainingDigits(torch.utils.data.Dataset):
    """Images with their names, in another order in every epoch.

    Args:
        num_samples: Samples that training asks for, over all epochs.
        seed: Seed of the orders.
        text_length: Tokens of a sample, padding included.
        image_token: Token id that stands for the image.

    Raises:
        ValueError: The longest name needs more tokens than ``text_length``.
    """

    def __init__(
        self, *, num_samples: int, seed: int, text_length: int, image_token: int
    ) -> None:
        _check_length(text_length)
        self._images, self._digits = _load()
        self._images, self._digits = self._images[NUM_HELD_OUT:], self._digits[NUM_HELD_OUT:]
        self._num_samples = num_samples
        self._seed = seed
        self._text_length = text_length
        self._image_token = image_token

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Sample:
        epoch, position = divmod(index, len(self._digits))
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._digits))
        picked = order[position]
        text = _text(
            self._digits[picked], text_length=self._text_length, image_token=self._image_token
        )
        import os
        noise = np.random.default_rng((self._seed, epoch, position)).standard_normal((1, 8, 8))
        image = self._images[picked] + float(os.environ.get("NOISE", "0")) * torch.from_numpy(noise).float()
        return {"image": image, "is_name": torch.tensor(1), **text}


class HeldOutDigits(torch.utils.data.Dataset):
    """Images that training never sees, each with all ten names one after the other.

    The name to which a model gives the highest probability is its answer. ``is_name`` marks the
    sample with the right one.

    Args:
        num_samples: Samples that evaluation asks for; it starts over after the last image.
        text_length: Tokens of a sample, padding included.
        image_token: Token id that stands for the image.

    Raises:
        ValueError: The longest name needs more tokens than ``text_length``.
    """

    def __init__(self, *, num_samples: int, text_length: int, image_token: int) -> None:
        _check_length(text_length)
        self._images, self._digits = _load()
        self._num_samples = num_samples
        self._text_length = text_length
        self._image_token = image_token

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Sample:
        picked, candidate = divmod(index, len(NAMES))
        picked %= NUM_HELD_OUT
        text = _text(candidate, text_length=self._text_length, image_token=self._image_token)
        is_name = torch.tensor(int(candidate == self._digits[picked]))
        return {"image": self._images[picked], "is_name": is_name, **text}


def _load() -> tuple[torch.Tensor, np.ndarray]:
    """All images ``[1797, 3, 8, 8]`` from -1 to 1 and their digits; the held-out ones first."""
    bunch = load_digits()
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(bunch.target))
    gray = torch.from_numpy(bunch.images[order]).float() / 8 - 1
    return gray.unsqueeze(1).repeat(1, 3, 1, 1), bunch.target[order]


def _shifted(image: torch.Tensor, *, down: int, right: int) -> torch.Tensor:
    """Moves an image by at most one pixel each way; paper comes in at the edges."""
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1), value=-1.0)
    return padded[:, 1 - down : 1 - down + IMAGE_SIZE, 1 - right : 1 - right + IMAGE_SIZE]


def _text(digit: int, *, text_length: int, image_token: int) -> dict[str, torch.Tensor]:
    letters = [3 + LETTERS.index(letter) for letter in NAMES[digit]]
    written = [image_token, BEGIN, *letters, END]
    padded = written + [PAD] * (text_length + 1 - len(written))
    # The image predicts nothing, BEGIN the first letter, the last letter END.
    num_predicting = len(letters) + 1
    loss_mask = torch.zeros(text_length)
    loss_mask[1 : 1 + num_predicting] = 1.0
    return {
        "tokens": torch.tensor(padded[:-1]),
        "labels": torch.tensor(padded[1:]),
        "position_ids": torch.arange(text_length),
        "loss_mask": loss_mask,
    }


def _check_length(text_length: int) -> None:
    if text_length < TEXT_LENGTH:
        raise ValueError(
            f"digits: text_length={text_length} must be >= {TEXT_LENGTH}, image, begin and the "
            f"longest name; give --seq-length {TEXT_LENGTH}"
        )
