"""Attaches Mosaic to a script that knows nothing of it."""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_mosaic.host.arguments import parse_and_validate_args
from megatron_mosaic.host.seams import replaced
from megatron_mosaic.host.training import pretrain


@contextmanager
def attached_to_script() -> Iterator[None]:
    """Replaces the two functions that a training script calls, until the scope ends.

    Scripts import them by name, so this must come before the script is loaded.
    """
    with replaced(
        {
            "megatron.training.arguments:parse_and_validate_args": parse_and_validate_args,
            "megatron.training:pretrain": pretrain,
        }
    ):
        yield
