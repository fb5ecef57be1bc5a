"""A checkpoint that is damaged, half written or of another model; a disk that is full."""

import functools
import io
import os
import random
import re
import resource
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest

from megatron_mosaic.layout.plan import Plan
from tests.parity.record import ARGUMENTS, OPTIMIZERS
from tests.parity.states import differing_states, prepare_saving
from tests.ranks import Ended, run_ranks, run_to_the_end

PLAN_PATH = Path(__file__).parent.parent / "plans" / "colocated_v2_l2.yaml"
WORLD_SIZE = Plan.load(PLAN_PATH).world_size
NUM_STEPS = 4
OPTIONS = ["--images", "one", "--use-distributed-optimizer", *OPTIMIZERS["adam"]]
SAVING = ["--save-interval", "1", "--eval-iters", "0"]
CHANCE = random.Random("mosaic checkpoints")


def _train(rank: int, options: list[str], strike: tuple | None = None) -> None:
    """Trains and saves; in the save of a step a rank dies, or the files may not grow."""
    prepare_saving(None)
    from megatron_mosaic.host.cpu import run_on_cpu

    run_on_cpu()
    from megatron_mosaic.host import training
    from megatron_mosaic.host.arguments import parse_and_validate_args
    from tests.parity import vlm_script

    if strike is not None:
        kind, step, number = strike
        (_die_in_save if kind == "kill" else _fill_disk)(rank, step, number)
    sys.argv = ["script", *ARGUMENTS, *OPTIONS, *options, "--mosaic-plan", str(PLAN_PATH)]
    vlm_script.main(parse_and_validate_args, training.pretrain)


def _die_in_save(rank: int, step: int, number: int) -> None:
    """Rank 1 and what it started are killed as it writes an item of a step's checkpoint."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    write, written = filesystem_async._write_item, []

    @functools.wraps(write)
    def write_and_die(*arguments, **options):
        result = write(*arguments, **options)
        stream = next(each for each in arguments if isinstance(each, io.BufferedWriter))
        if rank == 1 and f"iter_{step:07d}" in stream.name:
            written.append(result)
            if len(written) == number:
                stream.flush()
                os.killpg(os.getpgid(0), signal.SIGKILL)
        return result

    filesystem_async._write_item = write_and_die


def _fill_disk(rank: int, step: int, limit_bytes: int) -> None:
    """From a step's save on, files of this rank and of its writers may not grow further."""
    from megatron_mosaic.host import training

    save = training.stock_save_checkpoint

    def save_on_full_disk(iteration, *arguments, **options):
        if iteration == step and rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
        save(iteration, *arguments, **options)

    training.stock_save_checkpoint = save_on_full_disk


@cache
def saved_steps() -> Path:
    """Checkpoints of all four steps."""
    folder = Path(mkdtemp(prefix="mosaic-checkpoints-"))
    options = ["--save", str(folder), *SAVING]
    ended = run_to_the_end(_train, WORLD_SIZE, options, timeout_s=150)
    assert [end.status for end in ended] == [0, 0], ended
    return folder


def _choose(rank: int, folders: list[Path], wanted: int | None = None) -> list:
    """What this rank would load from each folder: an iteration, or the message of the error."""
    import torch.distributed as dist

    from megatron_mosaic.errors import HostError
    from megatron_mosaic.host.checkpoint_choice import choose_checkpoint

    chosen = []
    for folder in folders:
        try:
            chosen.append(choose_checkpoint(folder, wanted=wanted, group=dist.group.WORLD))
        except HostError as error:
            chosen.append(str(error))
    return chosen


def _chosen(folders: list[Path], wanted: int | None = None) -> list:
    first, second = run_ranks(_choose, 2, folders, wanted)
    assert first == second
    return first


def _largest_items(folder: Path) -> list:
    from megatron_mosaic.host.checkpoint_files import items_of, read_index

    items = items_of(read_index(folder))
    return sorted(items, key=lambda item: item.length_bytes)[-40:]


def _flip_bit(folder: Path) -> None:
    """In the middle of an item's archive, where the values of a tensor are."""
    item = CHANCE.choice(_largest_items(folder))
    with (folder / item.file).open("r+b") as file:
        file.seek(item.offset_bytes + item.length_bytes // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1 << CHANCE.randrange(8)]))


def _cut_file(folder: Path) -> None:
    path = CHANCE.choice(sorted(folder.glob("*.distcp")))
    os.truncate(path, CHANCE.randrange(path.stat().st_size))


def _remove_file(folder: Path) -> None:
    CHANCE.choice(sorted(path for path in folder.iterdir())).unlink()


def _scramble_index(folder: Path) -> None:
    index = folder / ".metadata"
    content = bytearray(index.read_bytes())
    start = CHANCE.randrange(len(content) // 2)
    content[start : start + 64] = CHANCE.randbytes(64)
    index.write_bytes(content)


@pytest.mark.parametrize("damage", [_flip_bit, _cut_file, _remove_file, _scramble_index])
def test_damaged_checkpoint_is_passed_over(tmp_path, capfd, damage):
    copies = [tmp_path / str(number) for number in range(3)]
    for copy in copies:
        shutil.copytree(saved_steps(), copy)
        damage(copy / "iter_0000004")

    assert _chosen(copies) == [3, 3, 3]
    said = re.findall(r"warning: checkpoint: iteration=4 in \S+ must be whole, but .*", _out(capfd))
    assert len(said) == 3
    assert all(line.endswith("; iteration 3 is loaded") for line in said)


def _out(capfd) -> str:
    return capfd.readouterr().out


def test_damage_in_several_checkpoints_is_passed_over_or_named(tmp_path):
    two, all_four = tmp_path / "two", tmp_path / "all"
    for copy, steps in ((two, (4, 3)), (all_four, (4, 3, 2, 1))):
        shutil.copytree(saved_steps(), copy)
        for step in steps:
            _cut_file(copy / f"iter_{step:07d}")

    second, nothing = _chosen([two, all_four])

    assert second == 2
    assert nothing.startswith("checkpoint: iteration=4 in ")
    assert nothing.endswith("; give another folder, or start without")


def test_damaged_checkpoint_that_was_asked_for_is_refused(tmp_path):
    shutil.copytree(saved_steps(), tmp_path / "copy")
    _flip_bit(tmp_path / "copy" / "iter_0000002")

    (message,) = _chosen([tmp_path / "copy"], 2)

    assert re.match(r"checkpoint: iteration=2 in \S+ must be whole, but \S+ is damaged", message)
    assert message.endswith("; give another --ckpt-step")


@pytest.mark.parametrize("tracked", ["", "9", "four", "\x00\xff"])
def test_tracker_that_names_no_checkpoint_leads_to_the_latest(tmp_path, tracked):
    shutil.copytree(saved_steps(), tmp_path / "copy")
    (tmp_path / "copy" / "latest_checkpointed_iteration.txt").write_text(tracked)

    assert _chosen([tmp_path / "copy"]) == [4]


def test_later_checkpoint_than_the_tracked_one_is_not_taken(tmp_path):
    shutil.copytree(saved_steps(), tmp_path / "copy")
    (tmp_path / "copy" / "latest_checkpointed_iteration.txt").write_text("2")

    assert _chosen([tmp_path / "copy"]) == [2]


def _resume(folder: Path, *options: str) -> list[Ended]:
    loading = ["--load", str(folder), "--eval-iters", "0", *options]
    return run_to_the_end(_train, WORLD_SIZE, loading, timeout_s=150)


def test_run_resumes_from_the_checkpoint_before_a_damaged_one(tmp_path):
    shutil.copytree(saved_steps(), tmp_path / "copy")
    _flip_bit(tmp_path / "copy" / "iter_0000004")
    (tmp_path / "copy" / "latest_checkpointed_iteration.txt").write_text("")

    ended = _resume(tmp_path / "copy", "--save", str(tmp_path / "again"), *SAVING)

    assert [end.status for end in ended] == [0, 0], ended
    assert "iteration 3 is loaded" in ended[0].output
    assert differing_states(saved_steps(), tmp_path / "again", step=4) == []


def test_checkpoint_of_another_model_is_refused():
    ended = _resume(saved_steps(), "--ffn-hidden-size", "96")

    assert all("SystemExit: 2" in end.output for end in ended), ended
    line = r"error: checkpoint: ffn_hidden_size=64 in iteration 4 of \S+ must equal 96 of this run"
    assert re.search(line, ended[0].output)


def test_checkpoint_of_another_encoder_is_refused():
    ended = _resume(saved_steps(), "--patch-dim", "7")

    assert all("SystemExit: 2" in end.output for end in ended), ended
    assert re.search(
        r"error: checkpoint: vision_model\.\S+=\(.*must have shape",
        "".join(end.output for end in ended),
    )


def _strike(strike: tuple, options: list[str], folder: Path) -> list[Ended]:
    saving = ["--save", str(folder), *SAVING, *options]
    return run_to_the_end(_train, WORLD_SIZE, saving, strike, timeout_s=150)


def test_run_killed_while_saving_goes_on_from_the_checkpoint_before(tmp_path):
    # Rank 1 writes some hundred items.
    strikes = [("kill", CHANCE.randint(2, NUM_STEPS), CHANCE.randint(1, 60)) for _ in range(3)]
    folders = [tmp_path / str(number) for number in range(3)]
    with ThreadPoolExecutor(3) as pool:
        runs = pool.map(_strike, strikes, [[], ["--async-save"], ["--async-save"]], folders)
        for strike, ended in zip(strikes, runs, strict=True):
            assert all(end.status != 0 for end in ended), (strike, ended)

    for (_, step, _), chosen in zip(strikes, _chosen(folders), strict=True):
        # In the background a save may not have been finished when the next one began.
        assert chosen in (step - 1, step - 2), (strikes, chosen)
    ended = _resume(folders[1], "--save", str(folders[1]), *SAVING)
    assert [end.status for end in ended] == [0, 0], ended
    assert differing_states(saved_steps(), folders[1], step=4) == []


@pytest.mark.parametrize("options", [[], ["--async-save"]])
def test_full_disk_ends_the_run_and_keeps_what_was_saved(tmp_path, options):
    strikes = [("fill", step, CHANCE.randrange(50_000, 150_000)) for step in (2, 4)]
    folders = [tmp_path / str(number) for number in range(2)]
    with ThreadPoolExecutor(2) as pool:
        runs = pool.map(_strike, strikes, [options] * 2, folders)
        for strike, ended in zip(strikes, runs, strict=True):
            assert all("SystemExit: 2" in end.output for end in ended), (strike, ended)
            line = (
                r"error: save: folder=\S+ must take a checkpoint, not fail with 'File too large' "
                rf"and \d+ MiB free; iteration {strike[1] - 1}, which was saved before, is kept"
            )
            assert re.search(line, ended[1].output), (strike, ended)

    assert _chosen(folders) == [1, 3]


@pytest.mark.parametrize("checksums", [True, False])
def test_flipped_bit_is_found_where_torch_wrote_checksums(tmp_path, checksums):
    import torch

    from megatron_mosaic.host.checkpoint_files import Item, find_damaged_item

    path, before = tmp_path / "file", torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(checksums)
    torch.save(torch.arange(1000), path)
    torch.serialization.set_crc32_options(before)
    content = bytearray(path.read_bytes())
    item = Item(file="file", offset_bytes=0, length_bytes=len(content))
    assert find_damaged_item(tmp_path, [item]) is None

    content[len(content) // 2] ^= 4
    path.write_bytes(content)

    found = "file is damaged at byte 0" if checksums else None
    assert find_damaged_item(tmp_path, [item]) == found
