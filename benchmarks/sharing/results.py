"""Results of many calls in one file, each part with the machine that it ran on."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

KEYS = {
    "p0": ("probe",),
    "p1": ("operation", "sms"),
    "p2": ("operations", "sms"),
    "p3": ("overhead",),
    "p4": ("case",),
    "p5": ("case", "arm", "gap_of_encoder"),
}
"""What tells the rows of a part apart."""

Results = dict[str, Any]


def read(path: Path) -> Results:
    """Reads a file; one that is not there yet has no parts."""
    return json.loads(path.read_text()) if path.exists() else {"parts": {}}


def write(path: Path, results: Results) -> None:
    """Writes a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def put_row(
    results: Results, part: str, row: Mapping[str, Any], *, machine: Mapping[str, Any]
) -> Results:
    """Puts a row where one of the same key was, else behind the others.

    A row carries the number of its machine's description: calls run on different machines. One
    that was skipped replaces nothing.
    """
    own = results["parts"].setdefault(part, {"machines": [], "rows": []})
    if machine not in own["machines"]:
        own["machines"].append(dict(machine))
    told = {**row, "machine": own["machines"].index(dict(machine))}
    keys = [key_of(part, each) for each in own["rows"]]
    if key_of(part, row) not in keys:
        own["rows"].append(told)
    elif "skipped" not in row:
        own["rows"][keys.index(key_of(part, row))] = told
    return results


def key_of(part: str, row: Mapping[str, Any]) -> str:
    """What tells a row from others of its part."""
    return json.dumps([row.get(key) for key in KEYS[part]])


def merge(first: Results, second: Results) -> Results:
    """Puts the rows of the second results into the first."""
    for part, own in second["parts"].items():
        for row in own["rows"]:
            bare = {key: value for key, value in row.items() if key != "machine"}
            put_row(first, part, bare, machine=own["machines"][row["machine"]])
    return first


def merge_files(into: Path, files: Sequence[Path]) -> None:
    """Puts the rows of files into one, which may be there already."""
    results = read(into)
    for path in files:
        merge(results, read(path))
    write(into, results)


def rows_of(results: Results, part: str) -> list[dict[str, Any]]:
    """Rows of a part; none before it has run."""
    return results["parts"].get(part, {"rows": []})["rows"]
