"""Applies the patches for a checkout of Megatron-LM, or takes them back."""

import argparse
from pathlib import Path

from megatron_mosaic.errors import HostError
from megatron_mosaic.patching.checkout import Checkout, open_checkout
from megatron_mosaic.patching.series import known_series
from megatron_mosaic.patching.standing import PatchStanding, Standing, choose_series


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("dir", type=Path, metavar="DIR", help="checkout of Megatron-LM")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="say what would be done, write nothing")
    what.add_argument("--revert", action="store_true", help="take back what is applied")


def run(args: argparse.Namespace) -> None:
    """Applies, checks or reverts, and says what became of each patch."""
    checkout = open_checkout(args.dir)
    standing = choose_series(checkout, known_series())
    print(_title(checkout, standing))
    print(_table(standing))
    if args.revert:
        _revert(checkout, standing)
    else:
        _apply(checkout, standing, writes=not args.check)


def _title(checkout: Checkout, standing: Standing) -> str:
    """What the checkout is, in its own words and by its files; the files decide."""
    name = standing.series.name
    return f"{checkout.folder}: Megatron-LM {checkout.version} by its version, {name} by its files"


def _table(standing: Standing) -> str:
    rows = [(each.patch.name, each.state, ", ".join(each.patch.files)) for each in standing.patches]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(
        f"  {name:<{widths[0]}}  {state:<{widths[1]}}  {files}" for name, state, files in rows
    )


def _apply(checkout: Checkout, standing: Standing, *, writes: bool) -> None:
    """Applies what is missing.

    Raises:
        HostError: A patch fails; nothing is written then.
    """
    for each in standing.of_state("fails"):
        raise _error(checkout, each, doing="apply")
    missing, applied = standing.of_state("fits"), standing.of_state("applied")
    if not missing:
        print(f"all {len(applied)} are applied already; nothing to do")
        return
    beside = f"; {len(applied)} applied already" if applied else ""
    if not writes:
        print(f"{len(missing)} of {len(standing.patches)} would be applied{beside}")
        return
    _write(checkout, standing, revert=False)
    print(f"applied {len(missing)} of {len(standing.patches)}{beside}; --revert takes them back")


def _revert(checkout: Checkout, standing: Standing) -> None:
    """Takes back what is applied.

    Raises:
        HostError: A patch is neither applied nor absent; nothing is written then.
    """
    for each in standing.of_state("fails"):
        raise _error(checkout, each, doing="revert")
    applied = standing.of_state("applied")
    if not applied:
        print("none is applied; nothing to do")
        return
    _write(checkout, standing, revert=True)
    print(f"reverted {len(applied)} of {len(standing.patches)}")


def _write(checkout: Checkout, standing: Standing, *, revert: bool) -> None:
    """Writes the files that change."""
    wanted = standing.unpatched if revert else standing.patched
    present = checkout.read(wanted)
    checkout.write({file: content for file, content in wanted.items() if content != present[file]})


def _error(checkout: Checkout, failed: PatchStanding, *, doing: str) -> HostError:
    failure, patch = failed.failure, failed.patch
    assert failure is not None
    path = checkout.folder / failure.file
    if failure.line is None:
        return HostError(
            f"patch: file={path} must exist for {patch.name} to {doing}; give a whole checkout"
        )
    side, else_ = ("old", "+") if doing == "apply" else ("new", "-")
    return HostError(
        f"patch: hunk {failure.hunk}={path}:{failure.line} must have the {side} lines of "
        f"{patch.name} to {doing}; nothing was written: compare the file with {patch.path} and "
        f"change its '{else_}' lines by hand, or restore the file and run the command again"
    )
