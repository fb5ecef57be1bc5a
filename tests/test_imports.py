import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_mosaic"

# A folder imports only itself and those before it; nothing in PLANNING needs torch.
PLANNING = [
    "errors",
    "fields",
    "tokens",
    "model",
    "cluster",
    "layout",
    "schedule",
    "cost",
    "planner",
    "report",
    "patching",
]
RUNNING = ["comm", "attention", "sharing", "engine", "host", "profile", "recipes", "rehearsal"]
ORDER = [*PLANNING, *RUNNING, "commands", "cli", "run"]
MEGATRON_IMPORTERS = {"host", "profile", "recipes", "rehearsal"}
LAZY = {"commands", "cli", "run"}  # each command imports what it needs when it is called

SOURCES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def folder_of(source):
    return source.parts[0].removesuffix(".py")


def imported_modules(source, *, at_start_only):
    tree = ast.parse((PACKAGE / source).read_text())
    nodes = tree.body if at_start_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}:{node.lineno} imports relatively"
            assert node.module is not None
            names = [node.module]
            if node.module == "megatron_mosaic":
                names = [f"megatron_mosaic.{alias.name}" for alias in node.names]
            yield from names


def imports_of(source):
    return set(imported_modules(source, at_start_only=folder_of(source) in LAZY))


def run_python(code, *options):
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=ROOT,
    )


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_imports_point_upward(source):
    allowed = [] if folder_of(source) == "__init__" else ORDER[: ORDER.index(folder_of(source)) + 1]

    for module in imports_of(source):
        top, _, rest = module.partition(".")
        if top == "megatron_mosaic" and rest not in ("", "__version__"):
            assert rest.split(".")[0] in allowed, f"{source} imports {module}"


@pytest.mark.parametrize(
    "source",
    [s for s in SOURCES if folder_of(s) in {*PLANNING, "commands", "cli", "__init__"}],
    ids=str,
)
def test_planning_imports_no_torch(source):
    tops = {module.split(".")[0] for module in imports_of(source)}

    assert not tops & {"torch", "megatron"}


@pytest.mark.parametrize(
    "source", [s for s in SOURCES if folder_of(s) not in MEGATRON_IMPORTERS], ids=str
)
def test_only_the_host_side_imports_megatron(source):
    assert not {m for m in imports_of(source) if m.split(".")[0] == "megatron"}


@pytest.mark.parametrize("module", ["megatron_mosaic", "megatron_mosaic.cli"])
def test_import_loads_no_heavy_package(module):
    process = run_python(f"import sys, {module}; print(*sys.modules)")

    assert not {"torch", "megatron", "numpy", "scipy"} & set(process.stdout.split())


def test_import_of_package_takes_less_than_50_ms():
    # The interpreter's own measure; the best of several, as other processes share the machine.
    times_us = []
    for _ in range(5):
        report = run_python("import megatron_mosaic", "-X", "importtime").stderr
        line = next(line for line in report.splitlines() if line.endswith("| megatron_mosaic"))
        times_us.append(int(line.split("|")[1]))

    assert min(times_us) < 50_000
