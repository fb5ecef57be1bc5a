"""Streams of a GPU that is not there: they follow what runs after what, by vector clocks."""

from contextlib import contextmanager

from megatron_mosaic.schedule.races import VectorClocks


class FakeCuda:
    """Makes streams and launches work in the current one."""

    def __init__(self):
        self.clocks = VectorClocks()
        self.current = self.stream("main")

    def stream(self, name):
        return FakeStream(name, self.clocks)

    @contextmanager
    def activate(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def launch(self, what, *, writes=True):
        """Uses memory in the current stream; returns a race with an earlier use."""
        return self.clocks.access(self.current.name, what, writes=writes)


class FakeStream:
    def __init__(self, name, clocks):
        self.name = name
        self._clocks = clocks

    def record_event(self):
        return self._clocks.record(self.name)

    def wait_event(self, event):
        self._clocks.wait(self.name, event)


class FakeTensor:
    """Notes the streams that keep its memory."""

    def __init__(self):
        self.held = []

    def record_stream(self, stream):
        self.held.append(stream)
