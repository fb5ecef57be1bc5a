"""Wrappers around what Megatron offers only with a GPU or TransformerEngine."""

import functools
from collections.abc import Callable
from typing import Any

from megatron.core.transformer.enums import AttnMaskType

from megatron_mosaic.host.norm import LocalNorm


def local_norm(cls: type, *args: Any, **kwargs: Any) -> LocalNorm:
    """Constructs our norm in place of upstream's wrapper of torch's."""
    return LocalNorm(*args, **kwargs)


def with_local_norm(construct: Callable[..., None]) -> Callable[..., None]:
    """Wraps the constructor of a vision model whose default norm cannot be built without TE."""

    @functools.wraps(construct)
    def construct_with_local_norm(self: Any, *args: Any, **kwargs: Any) -> None:
        if len(args) <= 2:  # config and layer spec; the norms come next
            kwargs.setdefault("ln_pre_impl", LocalNorm)
        if len(args) <= 3:
            kwargs.setdefault("ln_post_impl", LocalNorm)
        construct(self, *args, **kwargs)

    return construct_with_local_norm


def with_padding_at_the_end(construct: Callable[..., None]) -> Callable[..., None]:
    """Wraps the constructor of upstream's attention so that a padded causal mask is causal.

    Scripts ask for ``padding_causal`` when they pad sequences at their end, and give no mask:
    upstream's attention would then mask nothing. Real tokens never see what follows them.
    """

    @functools.wraps(construct)
    def construct_attention(
        self: Any, config: Any, layer_number: int, attn_mask_type: Any, *args: Any, **kwargs: Any
    ) -> None:
        if attn_mask_type == AttnMaskType.padding_causal:
            attn_mask_type = AttnMaskType.causal
        construct(self, config, layer_number, attn_mask_type, *args, **kwargs)

    return construct_attention


def with_unpacked_sequences(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps upstream's attention, which refuses parameters that say there is nothing packed."""

    @functools.wraps(forward)
    def attend(self: Any, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> Any:
        if packed_seq_params is not None and packed_seq_params.qkv_format == "sbhd":
            packed_seq_params = None
        return forward(self, *args, packed_seq_params=packed_seq_params, **kwargs)

    return attend


def without_cuda(initialize: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``initialize_megatron``, which demands CUDA unless it is told otherwise."""

    @functools.wraps(initialize)
    def initialize_without_cuda(*args: Any, **kwargs: Any) -> Any:
        return initialize(*args, **{**kwargs, "allow_no_cuda": True})

    return initialize_without_cuda


def if_not_compiled(compile_helpers: Callable[[], None]) -> Callable[[], None]:
    """Wraps the build of the data-set index: the wheel holds the result and no Makefile."""

    @functools.wraps(compile_helpers)
    def compile_if_missing() -> None:
        try:
            import megatron.core.datasets.helpers_cpp  # noqa: F401
        except ImportError:
            compile_helpers()

    return compile_if_missing
