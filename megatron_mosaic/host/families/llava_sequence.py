"""LLaVA's language half on ranks that each keep a part of every sequence.

Upstream merges whole sequences on every rank, then slices. Here a rank receives only the image
rows that it keeps, and puts them and its text embeddings into its part of the sequence.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.models.multimodal import llava_model
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mosaic.errors import HostError
from megatron_mosaic.host.attention import SplitTokens, gathering, with_core_attention
from megatron_mosaic.host.groups import ModuleGroups
from megatron_mosaic.host.multimodal_attention import check_config, core_attention
from megatron_mosaic.host.rotary import embed_slots, image_grid
from megatron_mosaic.host.sequence_parts import (
    NOBODY,
    MaskedParts,
    SequenceParts,
    ZigzagParts,
    to_device,
)
from megatron_mosaic.layout.ownership import Runs
from megatron_mosaic.layout.rows import Interval, Rows
from megatron_mosaic.layout.sequences import MaskedSharding, SampleSequence, sharding_of
from megatron_mosaic.layout.sharding import SequenceSharding
from megatron_mosaic.tokens.ranges import Integers

# Tables of where tokens go are kept for as many different batches.
_CACHED_TABLES = 256


@contextmanager
def building_on_parts(config: TransformerConfig, spec: ModuleSpec) -> Iterator[None]:
    """Gives LLaVA's language model a config with sequence and context parallelism.

    LLaVAModel refuses both without TransformerEngine, for reasons that end with its own merge; it
    is built without them, and only the language model inside gets the config.

    Args:
        config: The config.
        spec: Spec of its layers, with core attention for parts of sequences.
    """
    original = llava_model.GPTModel

    def build(**arguments: Any) -> torch.nn.Module:
        return original(**arguments | {"config": config, "transformer_layer_spec": spec})

    llava_model.GPTModel = build
    try:
        yield
    finally:
        llava_model.GPTModel = original


def parts_of(
    arguments: Mapping[str, Any], groups: ModuleGroups
) -> ZigzagParts | MaskedParts | None:
    """Tells how ranks have parts of sequences; None if all have them whole, without a mask.

    Args:
        arguments: LLaVAModel's.
        groups: Groups of the language model.

    Raises:
        LayoutError: The length cannot be split as Megatron does it.
        PlanError: Rows of images are no patches, and rotary positions count these.
    """
    length = arguments["language_max_sequence_length"]
    sharding = sharding_of(groups.placement, sequence_length=length)
    if sharding is None:
        return None
    if isinstance(sharding, MaskedSharding):
        counts_patches = arguments["language_position_embedding_type"] == "mrope"
        grid = image_grid(arguments) if counts_patches else None
        return MaskedParts(sharding, groups, grid=grid)
    return ZigzagParts(sharding, groups)


def spec_for(
    parts: ZigzagParts | MaskedParts,
    spec: ModuleSpec,
    config: TransformerConfig,
    groups: ModuleGroups,
) -> ModuleSpec:
    """Copies the spec of the layers with core attention for parts of sequences.

    Args:
        parts: How sequences are split.
        spec: The script's.
        config: The language model's, which loses what the parts cannot be computed with.
        groups: Groups of the language model.

    Raises:
        PlanError: The config asks for attention that cannot be computed under masks.
    """
    if isinstance(parts, ZigzagParts):
        return _zigzag_spec(spec, parts.sharding, groups)
    check_config(config)
    # Fused kernels take one embedding for all samples.
    config.apply_rope_fusion = config.fused_single_qkv_rope = False
    return with_core_attention(spec, lambda _: core_attention(parts.attention))


def _zigzag_spec(spec: ModuleSpec, sharding: SequenceSharding, groups: ModuleGroups) -> ModuleSpec:
    """Lets Megatron's own attention gather keys; TransformerEngine's is context-parallel itself."""
    if sharding.cp == 1:
        return spec
    positions = tuple(
        tuple(_context_positions(sharding, cp=cp).numbers()) for cp in range(sharding.cp)
    )
    split = SplitTokens(
        group=groups.collection.cp, positions=positions, length=sharding.sequence_length
    )
    return with_core_attention(
        spec,
        lambda attention: (
            gathering(attention, split) if attention is DotProductAttention else attention
        ),
    )


def _context_positions(sharding: SequenceSharding, *, cp: int) -> Rows:
    """Positions of a context-parallel rank, those of all its tensor-parallel parts."""
    parts = (sharding.positions(cp=cp, tp=tp) for tp in range(sharding.tp))
    return Rows.of(interval for part in parts for interval in part)


class _Tables(NamedTuple):
    """Where this rank's tokens come from and go to, as flat indices."""

    text_from: torch.Tensor  # into [b * text]
    text_to: torch.Tensor  # into [s * b]
    rows_to: torch.Tensor  # into [s * b]
    num_slots: int


class _LabelTables(NamedTuple):
    """Positions of the labels of this rank's context-parallel part ``[b, s]``."""

    positions: torch.Tensor
    is_token: torch.Tensor


class SequenceMerge:
    """Replaces a language half's merge and slicing by one step.

    Args:
        model: The language half, built without sequence and context parallelism.
        config: With them.
        parts: How sequences are split.
        groups: Groups of the language model.
    """

    def __init__(
        self,
        model: LLaVAModel,
        *,
        config: TransformerConfig,
        parts: SequenceParts,
        groups: ModuleGroups,
    ) -> None:
        self.parts = parts
        self._model = model
        self._groups = groups
        self._samples: tuple[SampleSequence, ...] = ()
        self._tables = lru_cache(_CACHED_TABLES)(self._make_tables)
        self._label_tables = lru_cache(_CACHED_TABLES)(self._make_label_tables)
        model.config = config
        # Only then LLaVAModel asks for what split_labels returns.
        model.sequence_parallel_lm = True
        model.context_parallel_lm = config.context_parallel_size
        # Every sequence has the full length, so that all ranks know who keeps which position.
        model._language_is_pipeline_parallel = True
        model._preprocess_data = self.preprocess
        model._process_embedding_token_parallel = self.split_labels
        if isinstance(parts, MaskedParts):
            embed_slots(model.language_model)

    def take(self, samples: tuple[SampleSequence, ...]) -> None:
        """Takes the samples of the next microbatch."""
        self._samples = samples

    def preprocess(
        self,
        image_rows: torch.Tensor | None,
        text: torch.Tensor | None,
        input_ids: torch.Tensor,
        *others: Any,
        **named: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        """Stands for ``LLaVAModel._preprocess_data``.

        Args:
            image_rows: Image rows that this rank keeps ``[rows, h]``.
            text: Text embeddings of whole samples ``[b, text, h]``.
            input_ids: Token ids with one for each image ``[b, text]``.
            others: Loss mask, labels and more, as upstream's.
            named: As upstream's.

        Returns:
            This rank's part of the embeddings ``[s / (cp * tp), b, h]`` on a first stage; labels
            and loss mask of whole sequences ``[b, s]`` on a last one; and what upstream returns
            beside them, since 0.20 token ids and positions.
        """
        model: Any = self._model
        first_stage, model.pre_process = model.pre_process, False
        try:
            _, *beside = LLaVAModel._preprocess_data(
                model, image_rows, text, input_ids, *others, **named
            )
        finally:
            model.pre_process = first_stage
        if not first_stage:
            return None, *beside
        assert image_rows is not None
        assert text is not None
        return self._merge(image_rows, text), *beside

    def split_labels(
        self,
        embeddings: torch.Tensor | None,
        labels: torch.Tensor | None,
        loss_mask: torch.Tensor | None,
        packed_seq_params: Any,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, Any]:
        """Stands for ``LLaVAModel._process_embedding_token_parallel``: embeddings are split.

        Returns:
            Embeddings as they are, labels and loss mask of this rank's context-parallel part, and
            what the layers get as ``packed_seq_params``.

        Raises:
            HostError: Samples are packed, and the plan asks for no mask that tells them apart.
        """
        device = torch.device(torch.cuda.current_device())
        sequences = self.parts.sequences(self._samples, device)
        if sequences is None and getattr(packed_seq_params, "qkv_format", "sbhd") != "sbhd":
            raise HostError(
                f"script: qkv_format={packed_seq_params.qkv_format} must be sbhd under a plan with "
                f"context or sequence parallelism; add attention: {{mask: multimodal_packed}} to "
                f"modules.language, or pad the samples so that none is packed"
            )
        if labels is not None:
            assert loss_mask is not None
            tables = self._label_tables(self._samples, device)
            labels = labels.gather(1, tables.positions).masked_fill(
                ~tables.is_token, llava_model.IGNORE_INDEX
            )
            loss_mask = loss_mask.gather(1, tables.positions).masked_fill(~tables.is_token, 0)
        return embeddings, labels, loss_mask, sequences or packed_seq_params

    def _merge(self, image_rows: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        batch, length, hidden = text.shape
        tables = self._tables(self._samples, length, text.device)
        if self.parts.splits_tp:
            # Every rank has all text embeddings and uses some: their gradients add up.
            text = copy_to_tensor_model_parallel_region(text, group=self._groups.collection.tp)
        merged = text.new_zeros(tables.num_slots * batch, hidden)
        merged = merged.index_copy(
            0, tables.text_to, text.reshape(-1, hidden).index_select(0, tables.text_from)
        )
        merged = merged.index_copy(0, tables.rows_to, image_rows)
        return merged.view(tables.num_slots, batch, hidden)

    def _make_tables(
        self, samples: tuple[SampleSequence, ...], text_length: int, device: torch.device
    ) -> _Tables:
        local = self.parts.tokens(samples)
        text_from, text_to, rows_to = [], [], []
        for sample, (positions, (images, _)) in enumerate(zip(local.own, samples, strict=True)):
            tokens, is_row = _sources(images, length=self.parts.length, text_length=text_length)
            # The slots behind a rank's last token are nobody's.
            slots = np.flatnonzero(positions != NOBODY)
            token, flat = tokens[positions[slots]], slots * len(samples) + sample
            text_from.append(sample * text_length + token[token >= 0])
            text_to.append(flat[token >= 0])
            rows_to.append(flat[is_row[positions[slots]]])
        return _Tables(
            text_from=to_device(np.concatenate(text_from), device),
            text_to=to_device(np.concatenate(text_to), device),
            rows_to=to_device(np.concatenate(rows_to), device),
            num_slots=local.num_slots,
        )

    def _make_label_tables(
        self, samples: tuple[SampleSequence, ...], device: torch.device
    ) -> _LabelTables:
        context = self.parts.tokens(samples).context
        is_token = context != NOBODY
        return _LabelTables(
            to_device(np.where(is_token, context, 0), device), to_device(is_token, device)
        )


def _sources(
    images: Runs, *, length: int, text_length: int
) -> tuple[Integers, npt.NDArray[np.bool_]]:
    """Tells what lies at the positions of a sample: a token of the text, an image row or nothing.

    Returns:
        The token at each position, -1 where there is none; and whether there is an image row.
    """
    tokens = np.full(length, -1, dtype=np.int64)
    for token, span in text_spans(images, text_length=text_length):
        inside = span.clip(Interval(0, length))
        tokens[slice(*inside)] = np.arange(token, token + inside.size)
    is_row = np.zeros(length, dtype=np.bool_)
    for run in images:
        is_row[slice(*run.clip(Interval(0, length)))] = True
    return tokens, is_row


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
