import sys
from contextlib import contextmanager
from itertools import count
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def fake_gpu(monkeypatch):
    """Gives torch an H200 whose driver is the one it is called with; streams are numbers."""
    handles = count(1)
    state = SimpleNamespace(current=SimpleNamespace(cuda_stream=0), priority_range=(0, -5))

    def stream(handle, priority=0, **_):
        return SimpleNamespace(
            cuda_stream=handle,
            priority=priority,
            record_event=lambda: None,
            wait_event=lambda event: None,
        )

    class Stream:
        def __new__(cls, device=None, priority=0):
            return stream(next(handles), priority)

        @staticmethod
        def priority_range():
            return state.priority_range

    @contextmanager
    def activate(stream):
        before, state.current = state.current, stream
        yield
        state.current = before

    replaced = {
        "synchronize": lambda device=None: None,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: SimpleNamespace(multi_processor_count=132),
        "Stream": Stream,
        "ExternalStream": lambda handle, device=None: stream(handle),
        "stream": activate,
        "current_stream": lambda device=None: state.current,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)

    def use(driver, *, priority_range=(0, -5)):
        state.priority_range = priority_range
        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
        return driver

    return use
