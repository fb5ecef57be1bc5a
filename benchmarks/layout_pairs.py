"""Pairs of layouts on eight ranks, and the samples that cross the boundary between them."""

from dataclasses import dataclass

from megatron_mosaic.tokens.names import Method, Preset


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """Layout of one module.

    Args:
        ranks: Global ranks in the order tp-cp-dp-pp, fastest first.
        tp: Tensor-parallel size.
        cp: Context-parallel size.
        dp: Data-parallel size.
        pp: Pipeline-parallel size.
        sp: Whether tensor-parallel ranks keep parts of sequences.
        tokens: How the tokens of a sequence with images that see themselves are assigned to
            context-parallel ranks; None is Megatron's zigzag, alike for all sequences.
    """

    ranks: tuple[int, ...]
    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    sp: bool = False
    tokens: Method | None = None

    def __str__(self) -> str:
        sizes = {"TP": self.tp, "CP": self.cp, "DP": self.dp, "PP": self.pp}
        shown = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        shown += ["SP"] if self.sp else []
        return " ".join([*shown, *([self.tokens] if self.tokens else [])]) or "1 rank"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A boundary and one microbatch.

    Args:
        source: Layout of the encoder.
        destination: Layout of the language model.
        items: Items of each sample, such as images, each of ``ITEM_ROWS`` rows.
    """

    source: Side
    destination: Side
    items: tuple[int, ...]

    @property
    def ranks(self) -> str:
        """How the ranks of the two modules lie to each other."""
        source, destination = set(self.source.ranks), set(self.destination.ranks)
        if source == destination:
            return "equal"
        if source & destination:
            return "overlapping"
        apart = max(source) < min(destination) or max(destination) < min(source)
        return "disjoint" if apart else "interleaved"

    def __str__(self) -> str:
        return f"{self.source} -> {self.destination}"


ITEM_ROWS = 64
SEQUENCE_LENGTH = 256
FIRST_POSITION = 8  # of a sample's first item; text lies between them
TEXT_BETWEEN = 8
HIDDEN_SIZE = 1024
MASK: Preset = "encoder_embedded"  # of sides that assign tokens by it

_ALL = tuple(range(8))
_LOW, _HIGH = _ALL[:4], _ALL[4:]
_ONE_EACH, _THREE_EACH = (1,) * 8, (3,) * 8

PAIRS = (
    # Equal ranks.
    Pair(source=Side(ranks=_ALL, dp=8), destination=Side(ranks=_ALL, tp=4, dp=2), items=_ONE_EACH),
    Pair(
        source=Side(ranks=_ALL, tp=4, dp=2),
        destination=Side(ranks=_ALL, tp=2, dp=4),
        items=_ONE_EACH,
    ),
    Pair(
        source=Side(ranks=_ALL, tp=2, dp=4),
        destination=Side(ranks=_ALL, tp=2, dp=4),
        items=_ONE_EACH,
    ),
    Pair(
        source=Side(ranks=_ALL, dp=8),
        destination=Side(ranks=_ALL, tp=8, sp=True),
        items=_THREE_EACH,
    ),
    Pair(
        source=Side(ranks=_ALL, dp=8),
        destination=Side(ranks=_ALL, tp=4, dp=2, sp=True),
        items=_THREE_EACH,
    ),
    Pair(
        source=Side(ranks=_ALL, dp=8),
        destination=Side(ranks=_ALL, tp=2, cp=2, dp=2, sp=True),
        items=_THREE_EACH,
    ),
    Pair(
        source=Side(ranks=_ALL, dp=8),
        destination=Side(ranks=_ALL, tp=4, dp=2, sp=True),
        items=(2, 0, 1, 3, 0, 1, 0, 2),
    ),
    Pair(
        source=Side(ranks=_ALL, tp=2, dp=4),
        destination=Side(ranks=_ALL, cp=2, dp=2, pp=2),
        items=_THREE_EACH,
    ),
    # Disjoint ranks.
    Pair(source=Side(ranks=_LOW, dp=4), destination=Side(ranks=_HIGH, tp=4), items=_ONE_EACH),
    Pair(
        source=Side(ranks=_LOW, tp=2, dp=2),
        destination=Side(ranks=_HIGH, tp=2, dp=2),
        items=_ONE_EACH,
    ),
    Pair(source=Side(ranks=_LOW, tp=4), destination=Side(ranks=_HIGH, dp=4), items=_ONE_EACH),
    Pair(
        source=Side(ranks=_LOW, tp=4),
        destination=Side(ranks=_HIGH, dp=4),
        items=(2, 0, 1, 3, 0, 1, 1, 2),
    ),
    Pair(
        source=Side(ranks=_LOW, dp=4),
        destination=Side(ranks=_HIGH, tp=2, dp=2),
        items=(2, 0, 1, 3, 0, 0, 1, 2),
    ),
    Pair(
        source=Side(ranks=_LOW, dp=4),
        destination=Side(ranks=_HIGH, tp=4, sp=True),
        items=_THREE_EACH,
    ),
    Pair(
        source=Side(ranks=_LOW, dp=4), destination=Side(ranks=_HIGH, tp=2, cp=2), items=_THREE_EACH
    ),
    Pair(
        source=Side(ranks=_LOW, cp=2, dp=2),
        destination=Side(ranks=_HIGH, tp=4, sp=True),
        items=_THREE_EACH,
    ),
    Pair(
        source=Side(ranks=_LOW, dp=2, pp=2),
        destination=Side(ranks=_HIGH, tp=2, pp=2),
        items=_ONE_EACH,
    ),
    Pair(
        source=Side(ranks=(0, 1, 2), dp=3),
        destination=Side(ranks=(3, 4), dp=2),
        items=(1,) * 6,
    ),
    Pair(source=Side(ranks=(0, 1), dp=2), destination=Side(ranks=(2, 3, 4), tp=3), items=(1,) * 2),
    # Ranks that some hosts of the one module share with the other, or that alternate.
    Pair(
        source=Side(ranks=(0, 1, 2), dp=3),
        destination=Side(ranks=(1, 2, 3, 4), tp=2, dp=2),
        items=(1, 2, 0, 1, 1, 2),
    ),
    Pair(
        source=Side(ranks=(0, 1, 2, 3, 4, 5), dp=6),
        destination=Side(ranks=(4, 5, 6, 7), tp=2, cp=2, sp=True),
        items=(3,) * 6,
    ),
    Pair(
        source=Side(ranks=(0, 2, 4, 6), dp=4),
        destination=Side(ranks=(1, 3, 5, 7), tp=2, dp=2),
        items=_ONE_EACH,
    ),
    Pair(
        source=Side(ranks=(0, 2, 4, 6), tp=2, dp=2),
        destination=Side(ranks=(1, 3, 5, 7), tp=4, sp=True),
        items=(3, 0, 0, 2, 0, 0, 0, 1),
    ),
    # Every sample is split by its own mask.
    Pair(
        source=Side(ranks=_ALL, dp=8),
        destination=Side(ranks=_ALL, cp=4, dp=2, tokens="balanced"),
        items=(2, 0, 1, 3, 0, 1, 3, 2),
    ),
    Pair(
        source=Side(ranks=_LOW, dp=4),
        destination=Side(ranks=_HIGH, tp=2, cp=2, sp=True, tokens="balanced"),
        items=(2, 0, 1, 3, 0, 1, 3, 2),
    ),
    Pair(
        source=Side(ranks=(0, 1, 2, 3, 4, 5), tp=2, dp=3),
        destination=Side(ranks=(4, 5, 6, 7), cp=4, tokens="lpt"),
        items=(3, 1, 0, 2),
    ),
)
