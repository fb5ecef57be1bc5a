"""Checks the patch series against checkouts of Megatron-LM: applies, trains, reverts, compares.

    python tools/check_patches.py CHECKOUT [CHECKOUT ...]

Checkouts are read only; the work is done on copies. Of each, ``pretrain_vlm.py`` trains three steps
on CPU: as it is, patched without a plan, and patched under a plan on two ranks. Tests do more
(``tests/upstream``); this takes a minute, and any checkout.

Exit status: 0, or 1 if a series does not apply, train alike, or leave the tree as it was.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mosaic.cli import main as mosaic
from tests.upstream.checkouts import Upstream, copy_of, differences
from tests.upstream.runs import Record, Run, Runner

PLAN = """format: 1
world_size: 2
global_batch_size: 16
micro_batch_size: 2
modules:
  vision: {ranks: 0-1, data_parallel_size: 2}
  language: {ranks: 0-1, tensor_model_parallel_size: 2}
edges: [[vision, language]]
schedule: {kind: colocated}
"""
BOUND = 1e-5


def main(argv: Sequence[str] | None = None) -> int:
    """Checks each checkout and prints what is wrong with it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkout", type=Path, nargs="+", help="checkout of Megatron-LM")
    arguments = parser.parse_args(argv)
    status = 0
    for checkout in arguments.checkout:
        with tempfile.TemporaryDirectory(prefix="check-patches-") as folder:
            wrong = check(checkout, Path(folder))
        print(f"{checkout}: {'; '.join(wrong) or 'applies, trains alike and reverts'}")
        status = 1 if wrong else status
    return status


def check(checkout: Path, folder: Path) -> list[str]:
    """Checks one checkout. Returns what is wrong."""
    tree = copy_of(Upstream(series="checkout", folder=checkout), folder)
    if mosaic(["patch", str(tree), "--check"]) != 0:
        return ["the series does not apply"]
    bare, stock = _train(tree, folder, Run(name="bare"), Run(name="stock", by_name=True))
    mosaic(["patch", str(tree)])
    patched, planned = _train(
        tree, folder, Run(name="bare"), Run(name="planned", num_ranks=2, plan=PLAN)
    )
    wrong = []
    if mosaic(["patch", str(tree), "--revert"]) != 0:
        wrong.append("the series does not revert")
    if patched != bare:
        wrong.append("without a plan the patched script trains something else")
    if _largest_difference(planned, stock[0]) > BOUND:
        wrong.append("under a plan losses differ from those of the stock script")
    wrong += [f"{file} is not as it was" for file in differences(tree, checkout)]
    return wrong


def _train(tree: Path, folder: Path, *runs: Run) -> list[list[Record]]:
    with closing(Runner(tree, folder)) as runner:
        return [runner(run) for run in runs]


def _largest_difference(records: Sequence[Record], reference: Record) -> float:
    """Largest relative difference of a loss."""
    return max(
        abs(own - other) / other
        for record in records
        for own, other in zip(record.losses, reference.losses, strict=True)
    )


if __name__ == "__main__":
    sys.exit(main())
