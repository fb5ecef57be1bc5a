"""Writes the numbers of ``results/*.json`` into ``README.md``, where a test looks for them.

python -m benchmarks.summary
"""

from pathlib import Path
from typing import Any

from benchmarks.machine import read_results

README = Path(__file__).resolve().parent / "README.md"
FIRST, LAST = "<!-- numbers -->\n", "<!-- end of numbers -->\n"


def numbers() -> str:
    """Returns the results in Markdown."""
    return f"\n{_bytes(read_results('boundary_bytes'))}\n{_times(read_results('boundary_time'))}\n"


def main() -> None:
    """Rewrites what stands between the two marks."""
    before, _, rest = README.read_text().partition(FIRST)
    _, _, after = rest.partition(LAST)
    README.write_text(f"{before}{FIRST}{numbers()}{LAST}{after}")


def describe(machine: dict[str, Any]) -> str:
    """Says what a measurement ran on."""
    return (
        f"{machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, torch {machine['torch']}, megatron-core "
        f"{machine['megatron_core']}, {machine['date']}, load average "
        f"{machine['load_average']:.0f} (others used the machine, too)"
    )


def _bytes(results: dict[str, Any]) -> str:
    summary = results["summary"]
    lines = [
        f"### Bytes\n\n{describe(results['machine'])}; eight ranks over gloo, "
        f"{results['row_bytes']} bytes a row, median of {results['repeats']}.\n",
        f"Of {summary['pairs']} pairs upstream's communicators take "
        f"{summary['pairs_that_upstream_takes']}. Mosaic's worst ratio of bytes received to the "
        f"least is {summary['worst_mosaic_ratio']:.3f} ({summary['most_rows_beyond_least']:.0f} "
        f"row of padding). Time of Mosaic / upstream, median over the pairs: "
        f"{summary['median_time_ratio']:.2f} with known counts, "
        f"{summary['median_time_ratio_derived']:.2f} with both routes derived anew.\n",
        "| source | destination | ranks | rows of samples | forward | gradient | upstream, both "
        "| time | time, new counts | why not upstream |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for pair in results["pairs"]:
        cells = [pair["source"], pair["destination"], pair["ranks"]]
        cells.append("equal" if len(set(pair["items"])) == 1 else "unlike")
        cells += [f"{ratio:.3f}" for ratio in pair["mosaic"]["ratio"]]
        taken = pair["upstream"] is not None
        cells.append(f"{pair['upstream']['ratio']:.3f}" if taken else "")
        cells += [
            f"{pair[key]:.2f}" if taken else "" for key in ("time_ratio", "time_ratio_derived")
        ]
        cells.append(pair["upstream_reason"] or "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _times(results: dict[str, Any]) -> str:
    lines = [
        f"### Time to derive routes\n\n{describe(results['machine'])}; "
        f"{results['ranks_per_module']} ranks a module, {results['samples']:,} samples; "
        f"milliseconds of processor time, the worst of some ranks.\n",
        "| layouts | new counts, microbatch of 8 | of 32 | known counts | whole step, of 8 | of 32 "
        "| all samples at once |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in results["cases"]:
        small, large = case["micro_batch_size_1"], case["micro_batch_size_4"]
        cells = [small["first_s"], large["first_s"], max(small["cached_s"], large["cached_s"])]
        cells += [small["step_s"], large["step_s"], case["at_once"]["first_s"]]
        shown = " | ".join(f"{seconds * 1e3:.3g}" for seconds in cells)
        lines.append(f"| {case['case']} | {shown} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
