import gzip
import json

import pytest

from megatron_mosaic.schedule.graph import Stage
from tests.report.plans import small_plan, write_trace
from tools.compare_trace import communication_shares, main, read_profile


def _profile(path, *events, base_s=1000.0):
    """A profile as torch exports it: events with their name, start and length in seconds."""
    written = [
        {"ph": "X", "cat": "kernel", "name": name, "ts": 1e6 * start_s, "dur": 1e6 * long_s}
        for name, start_s, long_s in events
    ]
    document = {"baseTimeNanoseconds": int(1e9 * base_s), "traceEvents": written}
    path.write_bytes(gzip.compress(json.dumps(document).encode()))
    return path


def _trace(folder, *tasks):
    folder.mkdir()
    entries = [
        {"step": 0, "kind": kind, "module": "language", "stage": 0, "microbatches": [0]}
        | {"start_s": start_s, "end_s": end_s}
        for kind, start_s, end_s in tasks
    ]
    (folder / "rank0.jsonl").write_text("".join(json.dumps(each) + "\n" for each in entries))
    return folder


def test_comparison_has_a_line_for_every_pass(tmp_path, capsys):
    plan = small_plan()
    plan.write(tmp_path / "plan.yaml")
    write_trace(plan, tmp_path / "trace", slower=1.25, steps=3)

    assert main([str(tmp_path / "plan.yaml"), str(tmp_path / "trace")]) == 0

    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    # Predicted are 1 s forward and 2 s backward; all of the trace is a quarter slower.
    assert ["F", "language.0", "1.00", "s", "1.25", "s", "1.25", "-"] in said
    assert ["B", "language.1", "2.00", "s", "2.50", "s", "1.25", "-"] in said


def test_share_of_communication_is_what_kernels_of_nccl_cover(tmp_path):
    trace = _trace(tmp_path / "trace", ("F", 1001.0, 1003.0), ("B", 1003.0, 1007.0))
    profile = _profile(
        tmp_path / "rank-0.json.gz",
        ("ncclDevKernel_AllReduce_Sum_bf16", 0.5, 1.0),  # half a second in F
        ("ncclDevKernel_AllGather_RING", 1.2, 0.3),  # inside the first one
        ("sm90_gemm_bf16", 1.5, 1.5),
        ("ncclDevKernel_AllReduce_Sum_bf16", 6.0, 2.0),  # one second in B
    )

    shares = communication_shares(trace, 0, read_profile(profile))

    # 0.5 s of 2 s, and 1 s of 4 s.
    language = Stage("language", 0)
    assert shares == pytest.approx({("F", language): 0.25, ("B", language): 0.25})


def test_profile_of_another_time_is_refused(tmp_path, capsys):
    plan = small_plan()
    plan.write(tmp_path / "plan.yaml")
    write_trace(plan, tmp_path / "trace")
    profile = _profile(tmp_path / "rank-0.json.gz", ("ncclDevKernel", 0.0, 1.0), base_s=9e8)
    arguments = ["--profile", str(profile), "--rank", "2"]

    assert main([str(tmp_path / "plan.yaml"), str(tmp_path / "trace"), *arguments]) == 2
    assert "tasks of rank 2=0 must be > 0 while it communicated" in capsys.readouterr().err


def test_file_that_is_no_profile_is_refused(tmp_path, capsys):
    plan = small_plan()
    plan.write(tmp_path / "plan.yaml")
    write_trace(plan, tmp_path / "trace")
    (tmp_path / "profile.json").write_text("[]")
    arguments = ["--profile", str(tmp_path / "profile.json")]

    assert main([str(tmp_path / "plan.yaml"), str(tmp_path / "trace"), *arguments]) == 2
    assert "profile.json: file must be a profile as torch exports it" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_profile_of_torch_itself_is_read(tmp_path):
    import torch

    with torch.profiler.profile() as profile, torch.profiler.record_function("gloo:all_reduce"):
        torch.ones(8).sum()
    profile.export_chrome_trace(str(tmp_path / "profile.json"))

    events = read_profile(tmp_path / "profile.json")

    assert len(events.start_s) == 1
    assert events.end_s[0] > events.start_s[0] > 1.7e9  # seconds since 1970
