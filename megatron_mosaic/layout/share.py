"""The share of a GPU that a module has while others run on it too."""

from dataclasses import dataclass

from megatron_mosaic.errors import LayoutError


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """A quota of every GPU that hosts a module; alone on a GPU it has all of it.

    Args:
        sms: Streaming multiprocessors (SMs) that it may use of each GPU while others run there.

    Raises:
        LayoutError: The number is not positive.
    """

    sms: int

    def __post_init__(self) -> None:
        if self.sms < 1:
            raise LayoutError(
                f"share.sms={self.sms} must be >= 1; "
                f"give multiprocessors, or remove share for the whole GPU"
            )

    def written(self) -> dict[str, int]:
        """The keys as a plan file has them."""
        return {"sms": self.sms}
