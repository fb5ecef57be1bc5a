"""Runs a plan on forked ranks and judges what they recorded."""

import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.rehearsal.findings import Finding, ended_findings, findings_of
from megatron_mosaic.rehearsal.job import PHASES, Job, Runs, rehearse_rank, rehearse_reference
from megatron_mosaic.rehearsal.ranks import RanksError, run_ranks, start_server
from megatron_mosaic.rehearsal.record import Record


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a rehearsal found.

    Args:
        findings: One for each thing that is looked at.
        wall_s: Time from the first fork to the verdict.
        cpu_s: Time of processors that the ranks took; 0 if they did not come to the end.
        peak_bytes: Most memory that the ranks had together, shared pages counted once.
        stacks: Where each rank was, if they did not come to the end.
    """

    findings: tuple[Finding, ...]
    wall_s: float
    cpu_s: float
    peak_bytes: int
    stacks: str = ""

    @property
    def passed(self) -> bool:
        """Whether nothing was found."""
        return all(finding.passed for finding in self.findings)


def rehearse(
    plan: Plan,
    *,
    time_limit_s: float,
    say: Callable[[str], None],
    before: Callable[[int], None] | None = None,
    reference: Record | None = None,
) -> Result:
    """Runs a plan on this machine, with thin modules, and judges it.

    Args:
        plan: The plan; every one of its ranks is a process.
        time_limit_s: When the ranks are ended.
        say: Is told how far the ranks are.
        before: Breaks the runtime of a rank, where a test wants to see that found.
        reference: What one process recorded, where that is known.
    """
    import torch.distributed as dist

    start_server()
    began_s = time.monotonic()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder:
        job = Job(
            plan=_written(plan, Path(folder)),
            folder=folder,
            resume_port=store.port,
            limit_s=time_limit_s / 2,
            before=before,
        )
        watch = _Watch(job, world_size=plan.world_size, began_s=began_s, say=say)
        runs: Sequence[Runs] = ()
        with ThreadPoolExecutor(1) as pool:
            known = pool.submit(_known, reference, plan, time_limit_s=time_limit_s)
            try:
                runs = _run_ranks(plan, job, time_limit_s=time_limit_s, watch=watch)
                found = findings_of(plan, runs, known.result())
                stacks = ""
            except RanksError as error:
                stacks = str(error)
                found = ended_findings(
                    plan, stacks, list(map(job.groups_of, range(plan.world_size)))
                )
    return Result(
        findings=tuple(found),
        wall_s=time.monotonic() - began_s,
        cpu_s=sum(each.cpu_s for each in runs),
        peak_bytes=watch.peak_bytes,
        stacks=stacks,
    )


def _known(reference: Record | None, plan: Plan, *, time_limit_s: float) -> Record:
    return reference or reference_of(plan, time_limit_s=time_limit_s)


def reference_of(plan: Plan, *, time_limit_s: float) -> Record:
    """Trains a plan's modules in one process, without the plan.

    Raises:
        RanksError: It did not come to the end.
    """
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder:
        path = _written(plan, Path(folder))
        (record,) = run_ranks(
            rehearse_reference, 1, path, init=False, timeout_s=time_limit_s, show=False
        )
    return record


def _written(plan: Plan, folder: Path) -> str:
    path = folder / "plan.yaml"
    plan.write(path)
    return str(path)


def _run_ranks(
    plan: Plan, job: Job, *, time_limit_s: float, watch: Callable[[Sequence[int]], None]
) -> Sequence[Runs]:
    return run_ranks(
        rehearse_rank,
        plan.world_size,
        job,
        init=False,
        timeout_s=time_limit_s,
        watch=watch,
        show=False,
    )


MEASURED_EVERY_S = 15.0


class _Watch:
    """Says how far the ranks are, and measures what they hold.

    Args:
        job: The rehearsal.
        world_size: Its ranks.
        began_s: When it began, by this machine's monotonic clock.
        say: Is told a line whenever all ranks have a phase behind them.
    """

    def __init__(
        self, job: Job, *, world_size: int, began_s: float, say: Callable[[str], None]
    ) -> None:
        self.peak_bytes = 0
        self._job = job
        self._world_size = world_size
        self._began_s = began_s
        self._say = say
        self._phase = 0
        self._measured_s = 0.0

    def __call__(self, pids: Sequence[int]) -> None:
        """Looks once."""
        now_s = time.monotonic()
        # Reading the page tables of many processes takes time from them.
        if now_s - self._measured_s > MEASURED_EVERY_S:
            self.peak_bytes = max(self.peak_bytes, sum(map(proportional_bytes, pids)))
            self._measured_s = time.monotonic()
        reached = min(self._job.phase_of(rank) for rank in range(self._world_size))
        for phase in range(self._phase, reached):
            self._say(
                f"[{now_s - self._began_s:4.0f} s] {self._world_size} ranks have {PHASES[phase]}"
            )
        self._phase = max(self._phase, reached)


def proportional_bytes(pid: int) -> int:
    """Memory of a process, each page divided by the processes that share it; 0 if it ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
