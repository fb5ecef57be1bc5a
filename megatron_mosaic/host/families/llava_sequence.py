"""LLaVA's language half on ranks that each keep a part of every sequence.

Upstream merges whole sequences on every rank, then slices. Here a rank receives only the image
rows that it keeps, and puts them and its text embeddings into its part of the sequence.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from megatron.core.models.multimodal import llava_model
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mosaic.comm.boundary import Samples
from megatron_mosaic.errors import HostError
from megatron_mosaic.host.attention import SplitTokens, gathering, with_core_attention
from megatron_mosaic.host.groups import ModuleGroups
from megatron_mosaic.layout.ownership import Runs
from megatron_mosaic.layout.rows import Interval, Places, Rows
from megatron_mosaic.layout.sharding import SequenceSharding

# Tables of where tokens go are kept for as many different batches.
_CACHED_TABLES = 256


@contextmanager
def building_on_parts(
    config: TransformerConfig, spec: ModuleSpec, sharding: SequenceSharding, groups: ModuleGroups
) -> Iterator[None]:
    """Gives LLaVA's language model a config with sequence and context parallelism.

    LLaVAModel refuses both without TransformerEngine, for reasons that end with its own merge; it
    is built without them, and only the language model inside gets the config.
    """
    original = llava_model.GPTModel
    if sharding.cp > 1:
        spec = with_core_attention(
            spec, lambda attention: _context_parallel(attention, sharding, groups)
        )

    def build(**arguments: Any) -> torch.nn.Module:
        return original(**arguments | {"config": config, "transformer_layer_spec": spec})

    llava_model.GPTModel = build
    try:
        yield
    finally:
        llava_model.GPTModel = original


def _context_parallel(attention: Any, sharding: SequenceSharding, groups: ModuleGroups) -> Any:
    """TransformerEngine's attention is context-parallel by itself; Megatron's own is not."""
    if attention is not DotProductAttention:
        return attention
    positions = tuple(
        tuple(_context_positions(sharding, cp=cp).numbers()) for cp in range(sharding.cp)
    )
    split = SplitTokens(
        group=groups.collection.cp, positions=positions, length=sharding.sequence_length
    )
    return gathering(attention, split)


def _context_positions(sharding: SequenceSharding, *, cp: int) -> Rows:
    """Positions of a context-parallel rank, those of all its tensor-parallel parts."""
    parts = (sharding.positions(cp=cp, tp=tp) for tp in range(sharding.tp))
    return Rows.of(interval for part in parts for interval in part)


class _Tables(NamedTuple):
    """Where this rank's tokens come from and go to, as flat indices."""

    text_from: torch.Tensor  # into [b * text]
    text_to: torch.Tensor  # into [s * b]
    rows_to: torch.Tensor  # into [s * b]


class SequenceMerge:
    """Replaces a language half's merge and slicing by one step.

    Args:
        model: The language half, built without sequence and context parallelism.
        config: With them.
        sharding: How sequences are split.
        groups: Groups of the language model.
    """

    def __init__(
        self,
        model: LLaVAModel,
        *,
        config: TransformerConfig,
        sharding: SequenceSharding,
        groups: ModuleGroups,
    ) -> None:
        self._model = model
        self._sharding = sharding
        self._groups = groups
        self._samples: Samples = ()
        position = groups.position
        self._own = sharding.positions(cp=position.cp, tp=position.tp if sharding.tp > 1 else 0)
        self._tables = lru_cache(_CACHED_TABLES)(self._make_tables)
        model.config = config
        model.sequence_parallel_lm = config.sequence_parallel
        model.context_parallel_lm = config.context_parallel_size
        # Every sequence has the full length, so that all ranks know who keeps which position.
        model._language_is_pipeline_parallel = True
        model._preprocess_data = self.preprocess
        model._process_embedding_token_parallel = self.split_labels

    def take(self, samples: Samples) -> None:
        """Takes where the image rows of the next microbatch belong."""
        self._samples = samples

    def preprocess(
        self,
        image_rows: torch.Tensor | None,
        text: torch.Tensor | None,
        input_ids: torch.Tensor,
        *others: Any,
        **named: Any,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Stands for ``LLaVAModel._preprocess_data``.

        Args:
            image_rows: Image rows that this rank keeps ``[rows, h]``.
            text: Text embeddings of whole samples ``[b, text, h]``.
            input_ids: Token ids with one for each image ``[b, text]``.
            others: Loss mask, labels and more, as upstream's.
            named: As upstream's.

        Returns:
            This rank's part of the embeddings ``[s / (cp * tp), b, h]`` on a first stage; labels
            and loss mask of whole sequences ``[b, s]`` on a last one.
        """
        model: Any = self._model
        first_stage, model.pre_process = model.pre_process, False
        try:
            _, labels, loss_mask = LLaVAModel._preprocess_data(
                model, image_rows, text, input_ids, *others, **named
            )
        finally:
            model.pre_process = first_stage
        if not first_stage:
            return None, labels, loss_mask
        assert image_rows is not None
        assert text is not None
        return self._merge(image_rows, text), labels, loss_mask

    def split_labels(
        self,
        embeddings: torch.Tensor | None,
        labels: torch.Tensor | None,
        loss_mask: torch.Tensor | None,
        packed_seq_params: Any,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, Any]:
        """Stands for ``LLaVAModel._process_embedding_token_parallel``: embeddings are split."""
        if getattr(packed_seq_params, "qkv_format", "sbhd") != "sbhd":
            raise HostError(
                f"script: qkv_format={packed_seq_params.qkv_format} must be sbhd under a plan with "
                f"context or sequence parallelism; pad the samples so that none is packed"
            )
        if labels is not None and self._sharding.cp > 1:
            positions = _context_positions(self._sharding, cp=self._groups.position.cp)
            assert loss_mask is not None
            labels, loss_mask = (
                torch.cat([tensor[:, start:stop] for start, stop in positions], dim=1)
                for tensor in (labels, loss_mask)
            )
        return embeddings, labels, loss_mask, packed_seq_params

    def _merge(self, image_rows: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        batch, length, hidden = text.shape
        tables = self._tables(self._samples, length, text.device)
        if self._sharding.tp > 1:
            # Every rank has all text embeddings and uses some: their gradients add up.
            text = copy_to_tensor_model_parallel_region(text, group=self._groups.collection.tp)
        merged = text.new_zeros(self._sharding.local_length * batch, hidden)
        merged = merged.index_copy(
            0, tables.text_to, text.reshape(-1, hidden).index_select(0, tables.text_from)
        )
        merged = merged.index_copy(0, tables.rows_to, image_rows)
        return merged.view(self._sharding.local_length, batch, hidden)

    def _make_tables(self, samples: Samples, text_length: int, device: torch.device) -> _Tables:
        places = Places(self._own)
        text_from, text_to, rows_to = [], [], []
        for sample, runs in enumerate(samples):
            for token, span in text_spans(runs, text_length=text_length):
                for inside in self._own.inside(span):
                    first = sample * text_length + token - span.start
                    text_from += range(first + inside.start, first + inside.stop)
                    text_to += _flat(places, inside, sample, len(samples))
            for run in runs:
                for inside in self._own.inside(run):
                    rows_to += _flat(places, inside, sample, len(samples))
        return _Tables(*(_to_device(each, device) for each in (text_from, text_to, rows_to)))


def text_spans(runs: Runs, *, text_length: int) -> Iterator[tuple[int, Interval]]:
    """Yields stretches of text: the first token, and the positions of the stretch.

    Args:
        runs: Positions of the images of a sample, each of which replaces one token.
        text_length: Tokens of the text, one for each image among them.
    """
    token = position = 0
    for run in runs:
        tokens = run.start - position
        if tokens:
            yield token, Interval(position, run.start)
        token, position = token + tokens + 1, run.stop
    if token < text_length:
        yield token, Interval(position, position + text_length - token)


def _flat(places: Places, inside: Interval, sample: int, batch: int) -> Sequence[int]:
    """Flat indices into ``[s * b]`` of some positions of a sample."""
    own = places.slice(inside)
    return range(own.start * batch + sample, own.stop * batch + sample, batch)


def _to_device(indices: Sequence[int], device: torch.device) -> torch.Tensor:
    """Copies indices without waiting for the device."""
    table = torch.tensor(indices, dtype=torch.int64)
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)
