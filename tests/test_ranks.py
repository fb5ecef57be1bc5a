import os
import select
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RanksError, run_ranks


def test_ranks_return_their_values_in_rank_order():
    # Ranks 0 to 2 hold 1, 2, 3 times the argument: their sum is 6 * 5.
    assert run_ranks(_sum_over_ranks, 3, 5) == [(0, 30.0), (1, 30.0), (2, 30.0)]


def _sum_over_ranks(rank, factor):
    total = torch.tensor(float((rank + 1) * factor))
    dist.all_reduce(total)
    return rank, total.item()


def test_ranks_can_initialise_torch_distributed_themselves():
    assert run_ranks(_initialise, 2, init=False) == [(False, "0", 2), (False, "1", 2)]


def _initialise(rank):
    before = dist.is_initialized()
    dist.init_process_group("gloo")
    dist.barrier()  # a rank that leaves breaks the connections that another is still making
    return before, os.environ["RANK"], dist.get_world_size()


def test_ranks_have_the_environment_of_the_caller(monkeypatch):
    monkeypatch.setenv("SET_BY_THE_TEST", "yes")

    assert run_ranks(_read_environment, 1) == ["yes"]


def _read_environment(rank):
    return os.environ.get("SET_BY_THE_TEST")


def test_ranks_show_what_they_print(capsys):
    run_ranks(_print, 2)

    assert capsys.readouterr().out == "[rank 0] I am 0\n[rank 1] I am 1\n"


def _print(rank):
    print(f"I am {rank}")


def test_ranks_report_the_rank_that_raised_and_where_the_others_were():
    with pytest.raises(RanksError, match=r"(?s)rank 1 of 3 raised ValueError.*no such.*barrier"):
        run_ranks(_raise_on_one, 3)


def _raise_on_one(rank):
    dist.barrier()
    if rank == 1:
        raise ValueError("no such token")
    dist.barrier()


def test_ranks_report_the_rank_that_died():
    with pytest.raises(RanksError, match=r"rank 0 of 2 died .*exit code 7"):
        run_ranks(_die_on_one, 2)


def _die_on_one(rank):
    if rank == 0:
        os._exit(7)
    dist.barrier()


def test_ranks_that_hang_are_ended_and_show_their_stacks():
    late = r"(?s)ranks \[0, 1\] of 2 did not return.*in _hang_each_in_its_way.*in _hang_each"
    with pytest.raises(RanksError, match=late):
        run_ranks(_hang_each_in_its_way, 2, timeout_s=1.0)


def _hang_each_in_its_way(rank):
    if rank == 0:
        dist.recv(torch.zeros(1), src=1)
    else:
        threading.Event().wait()


@pytest.mark.parametrize(
    ("then", "outcome"), [("hang", "did not return"), ("die", r"died .*exit code 7")]
)
def test_ranks_are_ended_with_the_processes_that_they_started(then, outcome, tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    with pytest.raises(RanksError, match=outcome):
        run_ranks(_start_process, 1, str(path), then, timeout_s=1.0)

    assert os.read(reader, 100) == b"started"
    # Nothing more can come: whoever could have written has ended.
    assert select.select([reader], [], [], 5.0)[0] == [reader]
    assert os.read(reader, 100) == b""
    os.close(reader)


def _start_process(rank, path, then):
    with open(path, "wb") as fifo:
        os.write(fifo.fileno(), b"started")
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=fifo)
    if then == "die":
        os._exit(7)
    child.wait()
