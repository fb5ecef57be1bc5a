"""Runs a function on several real ranks: processes that talk through gloo.

    def _check(rank, sizes):                    # at module level: it is found by its name
        dist.all_reduce(...)
        return rank

    values = run_ranks(_check, 4, (3, 5))       # values[r] is what rank r returned

The ranks are forked from one server process that has imported torch and Megatron already (see
``preload.py``), so eight of them are up in well under a second. Each call has ranks of its own:
nothing is left over from the call before. What holds for a rank:

- ``fn(rank, *args)`` is called; the default process group is gloo over all ranks, unless
  ``init=False``, where ``fn`` initialises it (or runs code that does).
- The environment is the caller's at the time of the call, plus what torchrun would set (``RANK``,
  ``LOCAL_RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ...), so ``init_process_group("gloo")`` works.
- Torch and Megatron use the CPU wherever they name CUDA: ``run_on_cpu`` has been called, and a GPU
  is hidden. With ``fresh=True`` a rank is a new interpreter instead, which may use a GPU.
- Arguments and results are pickled by value; tensors are copied.
- What a rank prints appears in the caller's standard output, after the call.
- When a rank raises or dies, or the time is up, every rank is ended and ``RanksError`` shows
  the traceback, and where each of the other ranks was.

The first call starts the server, which takes seconds; they do not count against ``timeout_s``.
``MOSAIC_RANKS_WITHOUT_MEGATRON=1`` makes that quicker, for tests that need no Megatron.
"""

import faulthandler
import multiprocessing
import os
import pickle
import re
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]  # of the package, from which the server imports
IMPORTED_FIRST = "MOSAIC_RANKS_IMPORT_FIRST"  # variable: a folder with a Megatron of its own
PRELOAD = "megatron_mosaic.rehearsal.preload"
IMPORTED_FIRST = "MOSAIC_RANKS_IMPORT_FIRST"  # variable: a folder with a Megatron of its own
GRACE_S = 5.0  # for a rank to write its stack and die
LAST_WORDS_S = 2.0  # for the others, when one ends by intent
SHOWN_CHARACTERS = 6000  # of what a failed rank wrote


class RanksError(Exception):
    """A rank raised an exception, died, or did not finish in time."""


@dataclass(kw_only=True)
class _Rank:
    index: int
    process: BaseProcess
    results: connection.Connection
    log: Path
    returned: bool = False
    value: Any = None
    error: str | None = None
    failed_at_s: float = 0.0

    def receive(self) -> None:
        """Takes what the rank reported, or notes that it died without a word."""
        try:
            kind, content, self.failed_at_s = pickle.loads(self.results.recv_bytes())
        except EOFError:
            self.process.join(GRACE_S)
            self.error = f"died without an exception (exit code {self.process.exitcode})"
            self.failed_at_s = time.monotonic()
            return
        if kind == "value":
            self.returned, self.value = True, content
        else:
            self.error = content

    def notice_death(self) -> None:
        """Notes that the rank has died, also where a process that it started keeps its pipe."""
        if not _exists(self.process.pid) and not self.results.poll():
            self.error = "died without an exception"
            self.failed_at_s = time.monotonic()


def _exists(pid: int | None) -> bool:
    try:
        os.kill(pid or 0, 0)
    except ProcessLookupError:
        return False
    return True


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 60.0,
    init: bool = True,
    fresh: bool = False,
    watch: Callable[[Sequence[int]], None] | None = None,
    show: bool = True,
) -> list[Any]:
    """Calls ``fn(rank, *args)`` on ``world_size`` processes and returns what each returned.

    Args:
        fn: A function at module level.
        world_size: Number of ranks.
        args: The same for every rank; pickled.
        timeout_s: Seconds from the start of the ranks until all of them must have returned.
        init: Whether the default gloo group exists when ``fn`` is called.
        fresh: Whether ranks are new interpreters, which import everything themselves.
        watch: Is called every second with the process ids of the ranks that still run.
        show: Whether what ranks print is printed after the call.

    Raises:
        RanksError: A rank raised, died or was late; all ranks have ended by then.
    """
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = _torchrun_environment(world_size, port=store.port)
    if not fresh:
        environment["CUDA_VISIBLE_DEVICES"] = ""
        start_server()
    context = multiprocessing.get_context("spawn" if fresh else "forkserver")
    call = pickle.dumps((fn, args))
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks: list[_Rank] = []
        try:
            for index in range(world_size):
                log = Path(folder) / f"rank{index}.log"
                gloo_timeout_s = timeout_s + GRACE_S if init else None
                ranks.append(_start(context, index, call, environment, log, gloo_timeout_s))
            failure = _wait(
                ranks,
                deadline_s=time.monotonic() + timeout_s,
                timeout_s=timeout_s,
                watch=watch,
            )
        finally:
            _end(ranks)
        if failure:
            raise RanksError(_report(failure, ranks))
        if show:
            _print_logs(ranks)
        return [rank.value for rank in ranks]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a rank ended: its exit status, or 1 if it raised, and what it wrote."""

    status: int | None
    output: str


def run_to_the_end(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60.0
) -> list[Ended]:
    """Calls ``fn(rank, *args)`` on processes of which some may die, and lets the others go on.

    They initialise torch.distributed themselves.

    Raises:
        RanksError: A rank did not end in time.
    """
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = _torchrun_environment(world_size, port=store.port) | {"CUDA_VISIBLE_DEVICES": ""}
    start_server()
    context = multiprocessing.get_context("forkserver")
    call = pickle.dumps((fn, args))
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        logs = [Path(folder) / f"rank{index}.log" for index in range(world_size)]
        ranks = [
            _start(context, index, call, environment, log, None) for index, log in enumerate(logs)
        ]
        try:
            deadline_s = time.monotonic() + timeout_s
            for rank in ranks:
                rank.process.join(max(deadline_s - time.monotonic(), 0.0))
            late = [rank.index for rank in ranks if rank.process.is_alive()]
            ended = [_how_it_ended(rank) for rank in ranks if rank.index not in late]
        finally:
            _end(ranks)
        if late:
            raise RanksError(_report(f"ranks {late} did not end within {timeout_s} s", ranks))
        return ended


def _how_it_ended(rank: _Rank) -> Ended:
    status = rank.process.exitcode
    if status == 0:
        rank.receive()
        status = int(rank.error is not None)
    return Ended(status=status, output=f"{_log(rank)}{rank.error or ''}")


def start_server(*, preload: str = PRELOAD) -> None:
    """Starts the process that ranks are forked from, without waiting for its imports.

    Args:
        preload: Module that it imports. The first call decides.
    """
    forkserver.set_forkserver_preload([preload])
    places = filter(None, (os.environ.get(IMPORTED_FIRST), str(ROOT)))
    with _environment(
        PYTHONPATH=os.pathsep.join(places), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""
    ):
        forkserver.ensure_running()


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    saved = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _torchrun_environment(world_size: int, *, port: int) -> dict[str, str]:
    # With the agent's store every rank is a client of ours: no rank has to win a free port.
    return dict(os.environ) | {
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": "none",
    }


def _start(
    context: Any,
    index: int,
    call: bytes,
    environment: dict[str, str],
    log: Path,
    gloo_timeout_s: float | None,
) -> _Rank:
    receiver, sender = context.Pipe(duplex=False)
    environment = environment | {"RANK": str(index), "LOCAL_RANK": str(index)}
    process = context.Process(  # not a daemon: saving a checkpoint starts processes
        target=_rank_main,
        args=(index, call, environment, str(log), gloo_timeout_s, sender),
        name=f"rank{index}",
    )
    process.start()
    sender.close()
    return _Rank(index=index, process=process, results=receiver, log=log)


def _wait(
    ranks: list[_Rank],
    *,
    deadline_s: float,
    timeout_s: float,
    watch: Callable[[Sequence[int]], None] | None = None,
) -> str | None:
    """Collects results until all have returned; says what went wrong otherwise."""
    while waiting := {rank.results: rank for rank in ranks if not rank.returned}:
        left_s = deadline_s - time.monotonic()
        round_s = left_s if watch is None else min(left_s, 1.0)
        ready = connection.wait(list(waiting), timeout=max(round_s, 0.0))
        if watch is not None:
            watch([rank.process.pid for rank in waiting.values() if rank.process.pid is not None])
            for rank in waiting.values():
                rank.notice_death()
        if not ready and round_s == left_s:
            late = [rank.index for rank in waiting.values()]
            return f"ranks {late} of {len(ranks)} did not return within {timeout_s} s"
        for results in ready:
            waiting[results].receive()  # type: ignore[index]
        failed = [rank for rank in ranks if rank.error]
        if failed:
            # The others often fail next, because their peer is gone: the first is the cause.
            first = min(failed, key=lambda rank: rank.failed_at_s)
            if (first.error or "").startswith("raised SystemExit"):
                _await_last_words(list(waiting))
            return f"rank {first.index} of {len(ranks)} {first.error}"
    return None


def _await_last_words(results: list[connection.Connection]) -> None:
    """Lets ranks that end by intent do so: one of them says why."""
    deadline_s = time.monotonic() + LAST_WORDS_S
    while results and (left_s := deadline_s - time.monotonic()) > 0:
        ended = connection.wait(results, timeout=left_s)
        results = [each for each in results if each not in ended]


def _end(ranks: list[_Rank]) -> None:
    """Ends what still runs; SIGABRT makes a rank write its stacks first."""
    for rank in ranks:
        if rank.returned:
            rank.process.join(GRACE_S)
    running = [rank for rank in ranks if rank.process.is_alive()]
    for rank in running:
        # One that raised has said where.
        _signal(rank, signal.SIGKILL if rank.error else signal.SIGABRT)
    deadline_s = time.monotonic() + GRACE_S
    for rank in running:
        rank.process.join(max(deadline_s - time.monotonic(), 0.0))
        _signal(rank, signal.SIGKILL)
    for rank in ranks:
        rank.process.join()
        if not rank.returned:
            # One that died by itself may have left processes that it started.
            _signal(rank, signal.SIGKILL)
        rank.process.close()
        rank.results.close()


def _signal(rank: _Rank, number: signal.Signals) -> None:
    """Signals the rank, and for SIGKILL also the processes that it started."""
    pid = rank.process.pid
    assert pid is not None
    with suppress(ProcessLookupError):
        if number == signal.SIGKILL:
            os.killpg(pid, number)
        else:
            os.kill(pid, number)


def _print_logs(ranks: list[_Rank]) -> None:
    for rank in ranks:
        for line in _log(rank).splitlines():
            print(f"[rank {rank.index}] {line}")


def _report(failure: str, ranks: list[_Rank]) -> str:
    parts = [failure]
    for rank in ranks:
        if log := _without_our_frames(_log(rank)):
            parts.append(f"--- rank {rank.index} wrote:\n{log[-SHOWN_CHARACTERS:]}")
    return "\n".join(parts)


def _without_our_frames(log: str) -> str:
    """Leaves in a dumped stack only what belongs to the test and what it called."""
    ours = (
        "/multiprocessing/",
        "/selectors.py",
        "/threading.py",
        str(Path(__file__)),
        "<string>",
    )
    lines = [
        line
        for line in log.splitlines()
        if not line.startswith("Extension modules:")
        and not (line.startswith('  File "') and any(part in line for part in ours))
    ]
    idle_thread = re.compile(r"^Thread 0x.* \(most recent call first\):\n\n", flags=re.MULTILINE)
    return idle_thread.sub("", "\n".join(lines)).strip()


def _log(rank: _Rank) -> str:
    return rank.log.read_text(errors="replace") if rank.log.exists() else ""


def _rank_main(
    index: int,
    call: bytes,
    environment: dict[str, str],
    log: str,
    gloo_timeout_s: float | None,
    results: connection.Connection,
) -> None:
    os.setpgid(0, 0)  # so that the processes it starts can be ended with it
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _write_output_to(log)
    faulthandler.enable(all_threads=True)
    os.environ.clear()
    os.environ.update(environment)
    try:
        outcome = ("value", _call(index, call, gloo_timeout_s))
    except BaseException as error:  # noqa: BLE001 - whatever it is, the caller must see it
        outcome = ("error", f"raised {type(error).__name__}:\n{traceback.format_exc()}")
    sys.stdout.flush()
    sys.stderr.flush()
    results.send_bytes(pickle.dumps((*outcome, time.monotonic())))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _write_output_to(path: str) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.close(file)
    # The server may have been started while pytest had replaced these.
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


def _call(index: int, call: bytes, gloo_timeout_s: float | None) -> Any:
    import torch
    import torch.distributed as dist

    from megatron_mosaic.rehearsal.gloo import share_one_device

    torch.set_num_threads(1)
    share_one_device()
    fn, args = pickle.loads(call)
    if gloo_timeout_s is not None:
        dist.init_process_group("gloo", timeout=timedelta(seconds=gloo_timeout_s))
    value = fn(index, *args)
    if dist.is_initialized():
        dist.destroy_process_group()
    return value
