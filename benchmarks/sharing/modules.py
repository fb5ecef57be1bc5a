"""Encoders and language models as plain torch modules, of the sizes that cases ask for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Tower:
    """Sizes of one module.

    Args:
        hidden: Hidden size.
        layers: Layers.
        heads: Heads of queries.
        groups: Heads of keys and values.
        ffn: Inner size of a feed-forward block.
        tokens: Tokens of an item, or of a sample of the language model.
        items: Items, or samples, of a microbatch.
        vocab: Words of a language model; None is an encoder.
        gated: Whether feed-forward blocks are gated.
        rows: Rows of an item that an encoder gives to the language model.
    """

    hidden: int
    layers: int
    heads: int
    groups: int
    ffn: int
    tokens: int
    items: int
    vocab: int | None = None
    gated: bool = False
    rows: int = 1


class Block(nn.Module):
    """Attention and a feed-forward block, each behind a norm."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower
        head = tower.hidden // tower.heads
        width = (tower.heads + 2 * tower.groups) * head
        make_norm = nn.RMSNorm if tower.gated else nn.LayerNorm
        self.norms = nn.ModuleList(make_norm(tower.hidden) for _ in range(2))
        bias = not tower.gated
        self.qkv = nn.Linear(tower.hidden, width, bias=bias)
        self.out = nn.Linear(tower.hidden, tower.hidden, bias=bias)
        self.up = nn.Linear(tower.hidden, tower.ffn * (2 if tower.gated else 1), bias=bias)
        self.down = nn.Linear(tower.ffn, tower.hidden, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Runs on ``[b, s, h]``."""
        tower = self.tower
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (tower.heads + 2 * tower.groups, -1))
        query, key, value = qkv.transpose(1, 2).split([tower.heads, tower.groups, tower.groups], 1)
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=tower.vocab is not None,
            enable_gqa=tower.groups != tower.heads,
        )
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        inner = self.up(self.norms[1](x))
        if tower.gated:
            gate, inner = inner.chunk(2, dim=-1)
            inner = F.silu(gate) * inner
        else:
            inner = F.gelu(inner)
        return x + self.down(inner)


class Encoder(nn.Module):
    """Patches in, rows of the language model's width out."""

    def __init__(self, tower: Tower, *, out: int, pooled: bool) -> None:
        super().__init__()
        self.tower = tower
        self.pooled = pooled
        self.patch = nn.Linear(tower.hidden, tower.hidden)
        self.positions = nn.Parameter(torch.zeros(tower.tokens, tower.hidden))
        self.blocks = nn.ModuleList(Block(tower) for _ in range(tower.layers))
        self.norm = nn.LayerNorm(tower.hidden)
        width = tower.hidden * (1 if pooled else tower.tokens // tower.rows)
        self.projector = nn.Linear(width, out)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Gives ``[b, rows, out]`` of ``[b, s, h]``, a row for some tokens that are neighbours."""
        x = self.patch(patches) + self.positions
        for block in self.blocks:
            x = block(x)
        merged = self.norm(x).unflatten(1, (self.tower.rows, -1))
        return self.projector(merged.mean(2) if self.pooled else merged.flatten(2))


class Language(nn.Module):
    """Words and the rows of encoders in, a loss out."""

    def __init__(self, tower: Tower, *, contrastive: bool) -> None:
        super().__init__()
        assert tower.vocab is not None
        self.contrastive = contrastive
        self.embedding = nn.Embedding(tower.vocab, tower.hidden)
        self.blocks = nn.ModuleList(Block(tower) for _ in range(tower.layers))
        self.norm = nn.RMSNorm(tower.hidden) if tower.gated else nn.LayerNorm(tower.hidden)
        if contrastive:
            self.scale = nn.Parameter(torch.ones(()))
        else:
            self.head = nn.Linear(tower.hidden, tower.vocab, bias=False)

    def forward(self, words: torch.Tensor, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """Loss of ``[b, s]`` words; rows of encoders take the first places, or are matched."""
        x = self.embedding(words)
        if not self.contrastive:
            first = torch.cat([each.reshape(len(words), -1, x.size(-1)) for each in rows], dim=1)
            x = torch.cat([first, x[:, first.size(1) :]], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.contrastive:
            return self._match(x.mean(1), [each.mean(1) for each in rows])
        return F.cross_entropy(self.head(x).flatten(0, 1).float(), words.flatten())

    def _match(self, text: torch.Tensor, others: Sequence[torch.Tensor]) -> torch.Tensor:
        """Contrastive loss of every encoder against the text, sample by sample."""
        text = F.normalize(text.float(), dim=-1) * self.scale.float()
        own = torch.arange(len(text), device=text.device)
        alike = [F.normalize(each.float(), dim=-1) @ text.T for each in others]
        return torch.stack([F.cross_entropy(each, own) for each in alike]).sum()


def make_modules(
    encoders: Mapping[str, Tower],
    language: Tower,
    *,
    contrastive: bool,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> dict[str, nn.Module]:
    """Makes the modules of a case with the same weights on every call, and gradients of zeros.

    Gradients have their memory from the start: captured graphs find them where they were.
    """
    torch.manual_seed(seed)
    with device:
        made: dict[str, nn.Module] = {
            name: Encoder(tower, out=language.hidden, pooled=contrastive)
            for name, tower in encoders.items()
        }
        made["language"] = Language(language, contrastive=contrastive)
    for module in made.values():
        module.to(dtype)
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
    return made
