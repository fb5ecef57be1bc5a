"""How evenly ranks share the attention of multimodal sequences, how much they exchange for it, and
how long deciding takes.

python -m benchmarks.cp_balance [--quick | --calibrate]

Ratios are the most loaded rank over the mean, in tiles that the attention kernel computes; the
worst of the seeds and, in brackets, their mean. What one cannot know of the published generator
is calibrated to its published baselines; another generator stands beside it.
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from time import process_time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.balance_chart import draw_balance
from benchmarks.drawn_masks import Family, Sizes, draw_mask
from benchmarks.machine import RESULTS, write_results
from benchmarks.optimal_deal import optimal_deal
from megatron_mosaic.tokens.assign import assign
from megatron_mosaic.tokens.assignment import TokenAssignment
from megatron_mosaic.tokens.mask import SequenceMask
from megatron_mosaic.tokens.names import Method
from megatron_mosaic.tokens.ranges import Integers
from megatron_mosaic.tokens.tiles import Tile, needed, tile_counts
from megatron_mosaic.tokens.visible import VisibleKeys

# Of those that `--calibrate` tries, what comes nearest to the published baselines.
CALIBRATED = Sizes(text_sigma=1.3, document_sigma=0.9, images="log_uniform")
OTHER = Sizes(text_sigma=1.0, document_sigma=1.0, images="uniform")
GENERATORS = {"calibrated": CALIBRATED, "other": OTHER}
PUBLISHED_TILE = Tile(128, 32)  # Cornstarch's kernel: the published table counts these
FLEX_TILE = Tile(128, 128)  # FlexAttention's BlockMask, torch.nn.attention.flex_attention
TILES = {"128x32": PUBLISHED_TILE, "128x128": FLEX_TILE}
METHODS: tuple[Method, ...] = ("contiguous", "zigzag", "lpt", "balanced", "local")
FAMILIES: tuple[Family, ...] = ("EP", "EE", "EEg", "MP", "causal")
RANKS = (2, 4, 8, 16, 32)
PUBLISHED_FAMILIES: tuple[Family, ...] = ("EP", "EE", "MP")
LOCAL_FAMILIES: tuple[Family, ...] = (
    "MP",
)  # where documents are packed there are keys that need not travel
DETAILED_RANKS = (8, 32)
# Tokens, and seeds from 0.
LENGTHS = {
    "calibrated": {32768: 8, 65536: 8, 131072: 8, 1 << 20: 2},
    "other": {32768: 8, 131072: 8},
}
QUICK = {32768: 2}
RUNS: Mapping[str, Sequence[Method]] = {"128x32": METHODS, "128x128": ("zigzag", "lpt", "balanced")}
REPEATS = 3
LIMIT_S = 10.0  # of CP-SAT, for each sequence above the goal

# Published means over EP, EE, MP and 8 seeds at CP 2..32, block 128, tiles 128x32.
PUBLISHED: Mapping[Method, Sequence[float]] = {
    "contiguous": (1.270, 1.564, 1.874, 2.275, 2.687),
    "zigzag": (1.135, 1.281, 1.479, 1.723, 1.912),
}
# Published shares of all keys that a rank needs, contiguous and zigzag, 128k: family, CP.
PUBLISHED_NEED: Mapping[tuple[Family, int], Sequence[float]] = {
    ("EP", 8): (0.65, 0.79),
    ("EE", 8): (0.57, 0.79),
    ("MP", 8): (0.16, 0.18),
    ("MP", 32): (0.06, 0.09),
}


def measure(
    mask: SequenceMask, visible: VisibleKeys, *, cp: int, method: Method, tile: Tile
) -> dict[str, float]:
    """Assigns a mask, and counts what each rank computes, keeps and receives."""
    times = []
    for _ in range(REPEATS):
        start = process_time()
        assignment = assign(mask, cp=cp, method=method, tile=tile)
        times.append(process_time() - start)
    loads = kernel_tiles(mask, visible, assignment, tile)
    need, received = keys(mask, visible, assignment)
    bound = 1.0
    if method == "balanced":
        edges = assignment.cut.edges
        costs = tile_counts(mask, edges=edges, tile_keys=tile.keys, visible=visible)
        bound = equal_tokens_bound(costs, assignment)
    return {
        "tiles": float(loads.max() / loads.mean()),
        "tokens": float(assignment.tokens.max() / assignment.tokens.mean()),
        "need": float(need.mean() / mask.length),
        "received": float(received.sum() / mask.length),
        "bound": bound,
        "time_s": min(times),  # others use the machine, too
    }


def kernel_tiles(
    mask: SequenceMask, visible: VisibleKeys, assignment: TokenAssignment, tile: Tile
) -> Integers:
    """Tiles that each rank's kernel computes: its rows are cut from the rank's own tokens."""
    counts = []
    for rank in range(assignment.cut.cp):
        held = assignment.held(rank)
        edges = np.append(np.arange(0, held.size, tile.queries), held.size)
        rows = tile_counts(mask, edges=edges, tile_keys=tile.keys, queries=held, visible=visible)
        counts.append(rows.sum())
    return np.array(counts)


def keys(
    mask: SequenceMask, visible: VisibleKeys, assignment: TokenAssignment
) -> tuple[Integers, Integers]:
    """Keys that each rank needs, and those that it has not itself, in tokens of pieces."""
    edges, sizes = assignment.cut.edges, assignment.cut.sizes
    counts = []
    for rank in range(assignment.cut.cp):
        held = assignment.held(rank)
        seen = needed(mask, edges=edges, queries=held, visible=visible)
        counts.append((sizes[seen].sum(), sizes[seen & (assignment.owner != rank)].sum()))
    need, received = np.array(counts).T
    return need, received


def equal_tokens_bound(costs: Integers, assignment: TokenAssignment) -> float:
    """What no assignment of equally many blocks to each rank can be below, over the mean.

    The dearest blocks are on ranks of their own, with the cheapest others beside them, or two of
    them are on one rank. The mean is a bound, too, and so 1 is.
    """
    cp, num_blocks = assignment.cut.cp, assignment.cut.num_blocks
    dearest = np.sort(costs[:num_blocks])[::-1]
    per_rank = num_blocks // cp
    if num_blocks < len(costs) or per_rank < 2:
        return 1.0
    cheapest = np.concatenate(([0], np.cumsum(dearest[::-1])))
    count = np.arange(1, cp + 1)
    apart = (np.cumsum(dearest)[:cp] + cheapest[count * (per_rank - 1)]) / count
    together = np.append(np.inf, dearest[: cp - 1] + dearest[1:cp] + cheapest[per_rank - 2])
    return float(max(1.0, np.minimum(apart, together).max() * cp / dearest.sum()))


def run(
    generator: str, tile_name: str, lengths: Mapping[int, int], methods: Sequence[Method]
) -> Iterator[dict[str, Any]]:
    """Measures methods on every family, length and number of ranks; yields a row for each."""
    for (length, seeds), family in product(lengths.items(), FAMILIES):
        sizes = GENERATORS[generator]
        drawn = [draw_mask(family, length=length, seed=seed, sizes=sizes) for seed in range(seeds)]
        masks = [(mask, VisibleKeys.of(mask)) for mask in drawn]
        by_position: dict[int, NDArray[np.float64]] = {}
        for cp, method in product(RANKS, methods):
            if method == "local" and family not in LOCAL_FAMILIES:
                continue
            tile = TILES[tile_name]
            found = [measure(*each, cp=cp, method=method, tile=tile) for each in masks]
            columns = {key: np.array([each[key] for each in found]) for key in found[0]}
            if method == "contiguous":
                by_position[cp] = columns["received"]
            if cp in by_position:
                columns["of_contiguous"] = columns["received"] / by_position[cp]
            row = {"generator": generator, "tile": tile_name, "length": length, "seeds": seeds}
            row |= {"family": family, "cp": cp, "method": method}
            row |= {f"{key}_worst": round(float(each.max()), 6) for key, each in columns.items()}
            row |= {f"{key}_mean": round(float(each.mean()), 6) for key, each in columns.items()}
            row["above_goal"] = [
                {"seed": seed, **proven(mask, cp, tile, tiles)}
                for seed, (mask, tiles) in enumerate(zip(drawn, columns["tiles"], strict=True))
                if method == "balanced" and tiles > goal(cp)
            ]
            yield row


def goal(cp: int) -> float:
    """The largest ratio of tiles that is aimed at."""
    return 1.005 if cp <= 16 else 1.015


def proven(mask: SequenceMask, cp: int, tile: Tile, tiles: float) -> dict[str, Any]:
    """What CP-SAT proves of the assignment of a mask with equal tokens, over the mean."""
    cut = assign(mask, cp=cp, method="contiguous", tile=tile).cut
    costs = tile_counts(mask, edges=cut.edges, tile_keys=tile.keys)
    mean = float(costs.sum() / cp)
    found = optimal_deal(costs, cp, round(tiles * mean), limit_s=LIMIT_S)
    return {"tiles": tiles, "least_found": found.most / mean, "bound": found.bound / mean}


def table(rows: Iterable[dict[str, Any]], *, title: str) -> str:
    """Ratios of tiles by method and ranks, over the three published families."""
    lines = [f"{title}", f"{'':12}" + "".join(f"{f'CP{cp}':>16}" for cp in RANKS)]
    rows = list(rows)
    for method in METHODS:
        cells = []
        for cp in RANKS:
            chosen = [
                row
                for row in rows
                if (row["method"], row["cp"]) == (method, cp)
                and row["family"] in PUBLISHED_FAMILIES
            ]
            if chosen:
                worst = max(row["tiles_worst"] for row in chosen)
                mean = np.mean([row["tiles_mean"] for row in chosen])
                cells.append(f"{worst:8.3f} ({mean:.3f})")
        if cells:
            lines.append(f"{method:12}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def details(rows: Iterable[dict[str, Any]]) -> str:
    """What the other columns say, by family and method at the most ranks."""
    lines = [
        f"{'tokens':>8} {'family':7}{'method':11}{'CP':>3}{'tiles':>8}{'mean':>8}{'bound':>8}"
        f"{'tokens':>8}{'need':>7}{'received':>9}{'ms':>8}{'/cont.':>8}{'worst':>8}"
    ]
    lines += [
        f"{row['length'] >> 10:>7}k {row['family']:7}{row['method']:11}{row['cp']:>3}"
        f"{row['tiles_worst']:8.4f}{row['tiles_mean']:8.4f}{row['bound_worst']:8.4f}"
        f"{row['tokens_worst']:8.4f}{row['need_mean']:7.3f}{row['received_mean']:9.2f}"
        f"{row['time_s_worst'] * 1e3:8.2f}{row.get('of_contiguous_mean', np.nan):8.2f}"
        f"{row.get('of_contiguous_worst', np.nan):8.2f}"
        for row in rows
        if row["cp"] in DETAILED_RANKS
    ]
    return "\n".join(lines)


def above_goal(rows: Iterable[dict[str, Any]]) -> str:
    """Sequences that miss the goal, beside what CP-SAT proves of them."""
    lines = []
    for row in rows:
        where = (
            f"{row['generator']} {row['tile']} {row['length'] >> 10}k {row['family']} CP{row['cp']}"
        )
        lines += [
            f"{where} seed {each['seed']}: {each['tiles']:.4f}; CP-SAT finds "
            f"{each['least_found']:.4f} and proves >= {each['bound']:.4f}"
            for each in row["above_goal"]
        ]
    return "\n".join(lines) or "none"


def deviation(sizes: Sizes) -> tuple[float, float]:
    """How far a generator is from the published baselines.

    Returns:
        Root mean square of the logarithms of ratios of tiles, and of shares of keys.
    """
    tiles, need = [], []
    for method, published in PUBLISHED.items():
        for cp, expected in zip(RANKS, published, strict=True):
            found = [
                measured["tiles"]
                for family in PUBLISHED_FAMILIES
                for measured in _of_seeds(family, 32768, cp, method, sizes)
            ]
            tiles.append(np.log(np.mean(found) / expected))
    for (family, cp), shares in PUBLISHED_NEED.items():
        for method, expected in zip(PUBLISHED, shares, strict=True):
            found = [each["need"] for each in _of_seeds(family, 131072, cp, method, sizes)]
            need.append(np.log(np.mean(found) / expected))
    return float(np.sqrt(np.mean(np.square(tiles)))), float(np.sqrt(np.mean(np.square(need))))


def _of_seeds(
    family: Family, length: int, cp: int, method: Method, sizes: Sizes
) -> Iterator[dict[str, float]]:
    for seed in range(8):
        mask = draw_mask(family, length=length, seed=seed, sizes=sizes)
        yield measure(mask, VisibleKeys.of(mask), cp=cp, method=method, tile=PUBLISHED_TILE)


def calibrate() -> None:
    """Prints how far generators are from the published baselines, the nearest last."""
    found = []
    for images, text_sigma, document_sigma in product(
        ("uniform", "log_uniform"), (0.8, 1.0, 1.3), (0.8, 0.9, 1.0, 1.3)
    ):
        sizes = Sizes(text_sigma=text_sigma, document_sigma=document_sigma, images=images)
        found.append((*deviation(sizes), sizes))
    for tiles, need, sizes in sorted(found, key=lambda each: -each[0] - each[1]):
        print(f"tiles {tiles:.3f} keys {need:.3f} {sizes}")


def main() -> None:
    """Measures, prints tables, writes the results and draws them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two seeds of 32k, nothing written")
    parser.add_argument("--calibrate", action="store_true", help="compare generators alone")
    options = parser.parse_args()
    if options.calibrate:
        calibrate()
        return
    rows: list[dict[str, Any]] = []
    for generator, (tile, methods) in product(GENERATORS, RUNS.items()):
        lengths = QUICK if options.quick else LENGTHS[generator]
        measured = list(run(generator, tile, lengths, methods))
        for length in lengths:
            chosen = [row for row in measured if row["length"] == length]
            print(table(chosen, title=f"\n{generator} generator, {length >> 10}k, tiles {tile}"))
        print(details(measured), flush=True)
        rows += measured
    print("\nabove the goal:", above_goal(rows), sep="\n")
    if not options.quick:
        sizes = {name: asdict(each) for name, each in GENERATORS.items()}
        write_results("cp_balance", {"sizes": sizes, "rows": rows})
        draw_balance(rows, RESULTS / "cp_balance.png")


if __name__ == "__main__":
    main()
