"""The command ``patch``, on checkouts that hold what the patches change and little else."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_mosaic.cli import main
from megatron_mosaic.errors import HostError
from megatron_mosaic.patching.checkout import open_checkout
from megatron_mosaic.patching.series import known_series, read_series
from tests.ranks import ROOT

SERIES = {series.name: series for series in known_series()}
SCHEDULES = "megatron/core/pipeline_parallel/schedules.py"
VERSIONS = {"core_v0.19.0": (0, 19, 1), "main_2026_08": (0, 20, 0)}


def _make_checkout(folder, name, version=None):
    """Writes files with the old side of every hunk, at lines that git has to look for."""
    major, minor, patch = version or VERSIONS[name]
    package_info = folder / "megatron" / "core" / "package_info.py"
    package_info.parent.mkdir(parents=True)
    package_info.write_text(f"MAJOR = {major}\nMINOR = {minor}\nPATCH = {patch}\n")
    for series_patch in SERIES[name].patches:
        (file,) = series_patch.files
        hunks = re.split(r"^@@ .* @@.*\n", series_patch.text, flags=re.MULTILINE)[1:]
        old = ["".join(_old_lines(hunk)) for hunk in hunks]
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("# not of a hunk\n" * 40 + "# between hunks\n".join(old) + "# the end\n")
    return folder


def _old_lines(hunk):
    for line in hunk.splitlines(keepends=True):
        if line.startswith("--\n"):
            return
        if line[0] in " -":
            yield line[1:]


def _contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if ".git" not in path.relative_to(folder).parts
    }


@pytest.fixture(params=SERIES)
def checkout(request, tmp_path):
    return _make_checkout(tmp_path / "fork", request.param)


@pytest.fixture
def fork(tmp_path):
    return _make_checkout(tmp_path / "fork", "core_v0.19.0")


def test_patch_knows_both_versions():
    assert {name: series.version for name, series in SERIES.items()} == {
        "core_v0.19.0": "0.19",
        "main_2026_08": "0.20",
    }


@pytest.mark.parametrize("series", SERIES.values(), ids=SERIES)
def test_every_patch_is_listed_small_and_says_why_it_exists(series):
    folder = ROOT / "patches" / series.name

    assert sorted(path.name for path in folder.glob("*.patch")) == [
        patch.name for patch in series.patches
    ]
    for patch in series.patches:
        message, _, changes = patch.text.partition("\n---\n")
        assert re.search(r"^Why: ", message, flags=re.MULTILINE)
        assert re.search(r"^Goes when: ", message, flags=re.MULTILINE)
        context = [line for line in changes.splitlines() if line.startswith(" ")]
        hunks = [line for line in changes.splitlines() if line.startswith("@@ ")]
        # All that git needs: a line before, a line after, and what lies between two changes.
        assert 2 * len(hunks) <= len(context) <= 3 * len(hunks)


def test_patch_applies_what_the_files_are_for_and_reverts_it(checkout, capsys):
    before = _contents(checkout)

    assert main(["patch", str(checkout)]) == 0
    patched = _contents(checkout)
    assert main(["patch", str(checkout), "--revert"]) == 0

    out = capsys.readouterr().out
    assert "applied 4 of 4; --revert takes them back" in out
    assert "reverted 4 of 4" in out
    changed = {file for file in before if patched[file] != before[file]}
    assert changed == {
        "pretrain_vlm.py",
        SCHEDULES,
        "megatron/training/training.py",
        "megatron/training/checkpointing.py",
    }
    assert b"from megatron_mosaic.host.training import pretrain\n" in patched["pretrain_vlm.py"]
    assert _contents(checkout) == before


def test_patched_repository_has_no_difference_after_revert(fork):
    subprocess.run(["git", "init", "--quiet"], cwd=fork, check=True)
    subprocess.run(["git", "add", "."], cwd=fork, check=True)

    assert main(["patch", str(fork)]) == 0
    patched = subprocess.run(["git", "diff", "--exit-code", "--quiet"], cwd=fork, check=False)
    assert main(["patch", str(fork), "--revert"]) == 0
    reverted = subprocess.run(["git", "diff", "--exit-code"], cwd=fork, check=False)

    assert (patched.returncode, reverted.returncode) == (1, 0)


def test_check_writes_nothing(checkout, capsys):
    before = _contents(checkout)

    assert main(["patch", str(checkout), "--check"]) == 0

    assert "4 of 4 would be applied" in capsys.readouterr().out
    assert _contents(checkout) == before


def test_version_is_known_by_the_files_not_by_its_number(tmp_path, capsys):
    fork = _make_checkout(tmp_path / "fork", "main_2026_08", version=(0, 19, 7))

    assert main(["patch", str(fork), "--check"]) == 0

    title = "Megatron-LM 0.19.7 by its version, main_2026_08 by its files"
    assert title in capsys.readouterr().out


def test_patch_applied_twice_changes_nothing(fork, capsys):
    main(["patch", str(fork)])
    before = _contents(fork)

    assert main(["patch", str(fork)]) == 0

    assert "all 4 are applied already; nothing to do" in capsys.readouterr().out
    assert _contents(fork) == before


def test_unpatched_tree_has_nothing_to_revert(fork, capsys):
    before = _contents(fork)

    assert main(["patch", str(fork), "--revert"]) == 0

    assert "none is applied; nothing to do" in capsys.readouterr().out
    assert _contents(fork) == before


def test_partly_applied_series_is_completed(fork, capsys):
    main(["patch", str(fork)])
    whole = _contents(fork)
    main(["patch", str(fork), "--revert"])
    (fork / SCHEDULES).write_bytes(whole[SCHEDULES])

    assert main(["patch", str(fork)]) == 0

    assert "applied 3 of 4; 1 applied already" in capsys.readouterr().out
    assert _contents(fork) == whole


def test_changes_of_ones_own_survive(fork):
    script = fork / "pretrain_vlm.py"
    script.write_text("# mine\n" * 30 + script.read_text() + "# mine too\n")
    before = _contents(fork)

    assert main(["patch", str(fork)]) == 0
    assert script.read_text().endswith("# mine too\n")
    assert main(["patch", str(fork), "--revert"]) == 0
    assert _contents(fork) == before


def test_windows_line_ends_are_an_own_change_and_not_half_applied(fork, capsys):
    path = fork / SCHEDULES
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    before = _contents(fork)

    assert main(["patch", str(fork)]) == 2

    assert f"hunk 1={path}" in capsys.readouterr().err
    assert _contents(fork) == before


def test_hunk_that_fails_is_named_and_nothing_is_written(fork, capsys):
    path = fork / SCHEDULES
    path.write_text(path.read_text().replace("isinstance(", "issubclass("))
    before = _contents(fork)

    assert main(["patch", str(fork)]) == 2

    message = capsys.readouterr().err
    # The hunk's own line of core_v0.19.0.
    assert f"error: patch: hunk 1={path}:148 must have the old lines of 0002" in message
    assert "change its '+' lines by hand" in message
    assert message.count("\n") == 1
    assert _contents(fork) == before


def test_second_hunk_of_a_file_is_named(tmp_path, capsys):
    fork = _make_checkout(tmp_path / "fork", "main_2026_08")
    script = fork / "pretrain_vlm.py"
    script.write_text(script.read_text().replace("import loss_func", "import own_loss_func"))

    assert main(["patch", str(fork)]) == 2

    assert f"error: patch: hunk 2={script}:40 must have the old" in capsys.readouterr().err


def test_change_of_a_patched_line_stops_the_revert(fork, capsys):
    main(["patch", str(fork)])
    path = fork / SCHEDULES
    path.write_text(path.read_text().replace("is not None:", "is not None:  # mine"))
    before = _contents(fork)

    assert main(["patch", str(fork), "--revert"]) == 2

    assert f"hunk 1={path}:148 must have the new lines of 0002" in capsys.readouterr().err
    assert _contents(fork) == before


def test_missing_file_is_named(fork, capsys):
    (fork / "pretrain_vlm.py").unlink()

    assert main(["patch", str(fork)]) == 2

    assert "pretrain_vlm.py must exist for 0001" in capsys.readouterr().err


def test_other_version_is_refused(fork, capsys):
    for series_patch in SERIES["core_v0.19.0"].patches:
        (fork / series_patch.files[0]).write_text("# of another time\n")
    (fork / "megatron/core/package_info.py").write_text("MAJOR = 0\nMINOR = 16\nPATCH = 1\n")

    assert main(["patch", str(fork)]) == 2

    message = "must be Megatron-LM core_v0.19.0 (0.19) or main_2026_08 (0.20), not 0.16.1"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["no_such_folder", "empty"])
def test_folder_that_is_no_checkout_is_refused(tmp_path, capsys, name):
    (tmp_path / "empty").mkdir()

    assert main(["patch", str(tmp_path / name)]) == 2

    assert "give the top folder of a checkout of Megatron-LM" in capsys.readouterr().err


def test_fork_inside_another_repository_is_patched(tmp_path):
    # Git would look for the files from the top of that repository, and skip them without a word.
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    fork = _make_checkout(tmp_path / "third_party" / "fork", "core_v0.19.0")
    before = _contents(fork)

    assert main(["patch", str(fork)]) == 0

    assert _contents(fork) != before


@contextmanager
def _as_nobody():
    """Gives up root's right to write everything, where the tests run as root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_file_without_permission_leaves_all_as_they_were():
    # Not in pytest's folder, which is its owner's alone.
    with tempfile.TemporaryDirectory() as name:
        fork = _make_checkout(Path(name) / "fork", "core_v0.19.0")
        if os.geteuid() == 0:
            for path in (Path(name), fork, *fork.rglob("*")):
                shutil.chown(path, 65534, 65534)
        os.chmod(fork / SCHEDULES, 0o444)
        before = _contents(fork)

        refused = rf"file={fork / SCHEDULES} must be writable, not give 'Permission denied'"
        with _as_nobody(), pytest.raises(HostError, match=refused):
            open_checkout(fork).write({"pretrain_vlm.py": b"changed", SCHEDULES: b"changed"})

        assert _contents(fork) == before


def test_command_without_git_says_so(fork, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(fork))

    assert main(["patch", str(fork)]) == 2

    assert capsys.readouterr().err == "error: patch: git= must be installed; install it\n"


def test_series_without_a_version_is_refused(tmp_path):
    path = tmp_path / "series"
    path.write_text("0001-something.patch\n")

    with pytest.raises(HostError, match=r"line 1='0001-something.patch' must be '# Megatron-LM x"):
        read_series(path)


def test_series_with_a_missing_patch_is_refused(tmp_path):
    path = tmp_path / "series"
    path.write_text("# Megatron-LM 0.19.1\n0001-something.patch\n")

    with pytest.raises(HostError, match=r"0001-something.patch must be readable"):
        read_series(path)


def test_installed_package_brings_the_series(tmp_path):
    built = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build", "--build-base", str(tmp_path / "build")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )

    assert built.returncode == 0, built.stderr
    (folder,) = (tmp_path / "build").glob("lib*/megatron_mosaic/patches")
    for name in SERIES:
        assert read_series(Path(folder) / name / "series").name == name
