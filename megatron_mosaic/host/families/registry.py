"""The families that a run may meet."""

from megatron_mosaic.host.families.family import ModelFamily
from megatron_mosaic.host.families.llava import LlavaFamily
from megatron_mosaic.host.families.mimo import MimoFamily


def known_families() -> tuple[ModelFamily, ...]:
    """All families; which one a run has shows when the script's provider builds its class."""
    return (LlavaFamily(), MimoFamily())
