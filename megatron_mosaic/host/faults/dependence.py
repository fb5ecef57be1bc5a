"""Whether a place in the code depends on other ranks: a communication call, or the wait for one."""

import dis
from types import CodeType, FrameType, TracebackType
from typing import Any

import torch.distributed as dist

_COMMUNICATION = ("torch.distributed", "megatron.core.distributed", "megatron_mosaic.comm")


def frame_communicates(frame: FrameType | None) -> bool:
    """Tells whether a thread, in its innermost frame, waits for other ranks.

    A loop or a sleep of the script's own does not. Megatron waits for the handles of asynchronous
    collectives in many places; torch's own ``wait`` is not Python and has no frame.
    """
    return frame is not None and _communicates(frame.f_globals, frame.f_code, frame.f_lasti)


def error_communicates(error: BaseException) -> bool:
    """Tells whether an error came out of a communication call, perhaps for another rank's sake."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if isinstance(error, dist.DistError):
        return True
    if trace is None:
        return False
    frame = trace.tb_frame
    return _communicates(frame.f_globals, frame.f_code, trace.tb_lasti)


def _communicates(names: dict[str, Any], code: CodeType, at: int) -> bool:
    if names.get("__name__", "").startswith(_COMMUNICATION):
        return True
    before = [each for each in dis.get_instructions(code) if each.offset < at]
    called = next((each for each in reversed(before) if each.opname == "LOAD_ATTR"), None)
    return called is not None and called.argval == "wait"
