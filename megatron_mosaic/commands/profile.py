"""Measures this machine's devices and links, and writes them as a cluster file.

    megatron-mosaic profile my_cluster.yaml --base h100      # on the GPUs of this machine
    torchrun ... -m megatron_mosaic.cli profile my_cluster.yaml --base h100    # on many nodes
    megatron-mosaic profile cpu.yaml --quick                 # on a CPU, to try it
    megatron-mosaic profile my_cluster.yaml --base my_cluster.yaml --sharing   # modules on one GPU

The file says where each number is from. `megatron-mosaic plan MODEL my_cluster.yaml` uses it; what
was not measured is the base's.
"""

import argparse
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mosaic.errors import PlanError

if TYPE_CHECKING:
    from megatron_mosaic.cluster.spec import Cluster
    from megatron_mosaic.profile.result import Fitted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("output", type=Path, help="cluster file to write, YAML")
    parser.add_argument(
        "--base", help="cluster whose data sheet and unmeasured numbers to keep: a name or a file"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="a GPU if there is one")
    parser.add_argument(
        "--nproc", type=int, help="ranks to start: by default one for each GPU, or two on a CPU"
    )
    parser.add_argument(
        "--sharing",
        action="store_true",
        help="measure operations on parts of a GPU and beside others, in place of all else",
    )
    parser.add_argument("--quick", action="store_true", help="a few small sizes, to try it")


def run(args: argparse.Namespace) -> None:
    """Measures, prints a table and writes the file.

    Raises:
        PlanError: An argument cannot work.
        LayoutError: A measured rate exceeds the base's data sheet.
        HostError: There is no such device, or a rank failed.
    """
    if args.sharing:
        _measure_sharing(args)
        return
    from megatron_mosaic.cluster.cluster_file import write_cluster
    from megatron_mosaic.cluster.shipped import load_cluster
    from megatron_mosaic.profile.ranks import ProfileSettings, launched_rank, measure
    from megatron_mosaic.profile.result import Fitted, measured_cluster

    settings = ProfileSettings(device=args.device, quick=args.quick)
    rank = launched_rank()
    if rank:
        # Files are rank 0's matter: another node may not have them.
        measure(settings, nproc=None)
        return
    _check(args, launched=rank is not None)
    base = None if args.base is None else load_cluster(args.base)
    measured = measure(settings, nproc=args.nproc)
    assert measured is not None
    fitted = Fitted.of(measured, date=datetime.now(UTC).date().isoformat())
    cluster = measured_cluster(fitted, base)
    args.output.write_text(write_cluster(cluster), encoding="utf-8")
    _print_table(fitted)
    print(_check_of_layer(fitted, cluster))
    print(f"wrote {args.output}")


def _measure_sharing(args: argparse.Namespace) -> None:
    from megatron_mosaic.cluster.cluster_file import write_cluster
    from megatron_mosaic.cluster.shipped import load_cluster
    from megatron_mosaic.profile.sharing_result import measure_sharing, report, with_sharing

    for name in ("nproc", "device"):
        if getattr(args, name) is not None:
            raise PlanError(
                f"profile: {name}={getattr(args, name)} must not be given with --sharing, which "
                f"measures one GPU; remove it"
            )
    if args.base is None:
        raise PlanError(
            "profile: base must be given with --sharing, which measures nothing else; name a "
            "cluster, such as one that profile has written"
        )
    _check_output(args.output)
    cluster = load_cluster(args.base)
    date = datetime.now(UTC).date().isoformat()
    measured = measure_sharing(cluster.gpu, quick=args.quick, date=date)
    text = write_cluster(with_sharing(cluster, measured))
    args.output.write_text(text, encoding="utf-8")
    for line in report(measured.fitted):
        print(line)
    print(f"wrote {args.output}")


def _check(args: argparse.Namespace, *, launched: bool) -> None:
    if launched and args.nproc is not None:
        raise PlanError(
            f"profile: nproc={args.nproc} must not be given under torchrun, which has started the "
            f"ranks; remove it"
        )
    if args.nproc is not None and args.nproc < 1:
        raise PlanError(f"profile: nproc={args.nproc} must be >= 1; give the number of ranks")
    if args.nproc == 1 and args.base is None:
        raise PlanError(
            "profile: nproc=1 must be > 1 without --base, for one rank alone has no links to "
            "measure; name a cluster or start more ranks"
        )
    _check_output(args.output)


def _check_output(output: Path) -> None:
    if output.suffix not in (".yaml", ".yml"):
        raise PlanError(f"profile: output={output} must end with .yaml; rename it")
    if not output.parent.is_dir():
        raise PlanError(
            f"profile: output={output} must lie in a folder that exists; make {output.parent} first"
        )


def _check_of_layer(fitted: "Fitted", cluster: "Cluster") -> str:
    """Says how far the file's numbers are from a whole layer, of which none was fitted."""
    from megatron_mosaic.profile.layer import LAYER_SIZES, estimate_layer

    measured = fitted.measurements
    estimated = estimate_layer(LAYER_SIZES[measured.device.kind, measured.quick], cluster)
    passes = zip(("forward", "both passes"), measured.layer, estimated, strict=True)
    return "a whole layer in bf16: " + "; ".join(
        f"{name} measured {own_s * 1e3:.3g} ms, estimated {it_s * 1e3:.3g} ms ({it_s / own_s:.0%})"
        for name, own_s, it_s in passes
    )


def _print_table(fitted: "Fitted") -> None:
    from rich.console import Console
    from rich.table import Table

    from megatron_mosaic.profile.result import table_rows

    table = Table(title=fitted.measurements.device.describe())
    table.add_column("operation", no_wrap=True)
    for name in ("sizes", "fastest", "fitted limit", "and", "mean error"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in table_rows(fitted):
        table.add_row(*row)
    Console(width=120).print(table)
