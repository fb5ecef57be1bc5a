"""Random numbers: the CPU's generator takes the part of the CUDA device's."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch


def getting_state(original: Any) -> Callable[..., torch.Tensor]:
    """Makes a function that returns the state of the device's generator."""
    return lambda *args, **kwargs: torch.get_rng_state()


def setting_state(original: Any) -> Callable[..., None]:
    """Makes a function that sets the state of the device's generator."""
    return lambda new_state, *args, **kwargs: torch.set_rng_state(new_state)


def seeding(original: Any) -> Callable[[int], None]:
    """Makes a function that seeds the device's generator."""

    def seed_device(seed: int) -> None:
        torch.default_generator.manual_seed(int(seed))

    return seed_device


def calling_now(original: Any) -> Callable[..., None]:
    """Makes a function that calls what torch would queue until CUDA is initialised."""

    def call(callback: Callable[[], Any], **kwargs: Any) -> None:
        callback()

    return call


def only_generator(original: Any) -> tuple[torch.Generator, ...]:
    """Generators of all devices: the CPU's."""
    return (torch.default_generator,)


def silence_comparison() -> None:
    """Drops upstream's warning that CPU numbers were drawn where only the device should draw."""
    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    logger.addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def drawn_from_own_state(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a method of a data loader's iterator so that its draws leave the model's state alone.

    On a GPU the model draws from the device and the loader from the CPU. Sharing one generator
    would tell tensor-parallel ranks apart, of which only the first may have a loader: their
    dropout masks would differ.
    """

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        model_state = torch.get_rng_state()
        torch.set_rng_state(getattr(self, "_own_generator_state", model_state))
        try:
            return original(self, *args, **kwargs)
        finally:
            self._own_generator_state = torch.get_rng_state()
            torch.set_rng_state(model_state)

    return method
