"""What a measurement ran on, and where its results go."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def describe_machine() -> dict[str, Any]:
    """Describes what was measured, the processor, memory and the packages that matter."""
    return {
        "commit": _commit(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": _version("torch"),
        "megatron_core": _version("megatron-core"),
        "load_average": os.getloadavg()[0],
        "date": datetime.now(UTC).date().isoformat(),
    }


def _version(package: str) -> str | None:
    """None where it is not installed: not every measurement needs every package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit that was measured, with ``-dirty`` if files differ from it; None without git.

    Results are no part of what is measured: a benchmark that writes them changes nothing.
    """
    command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*"]
    changed = ["git", "status", "--porcelain", "--", ".", f":(exclude){RESULTS}"]
    try:
        commit, changes = (
            subprocess.run(
                each, cwd=RESULTS.parent.parent, capture_output=True, text=True, check=True
            ).stdout.strip()
            for each in (command, changed)
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changes else commit


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def write_results(name: str, results: Mapping[str, Any]) -> Path:
    """Writes the results of one subject, with the machine's description."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": describe_machine(), **results}, indent=1) + "\n")
    return path


def read_results(name: str) -> dict[str, Any]:
    """Reads the results of one subject."""
    return json.loads((RESULTS / f"{name}.json").read_text())
