"""Notices that this process is asked to end, even while its main thread waits for another rank.

torchrun ends the other ranks as soon as one has died. Their main threads are inside collectives
then, where Python's signal handlers do not run, and by default they would die without a word of
the lost rank. What runs at once is the part of Python's handler that writes to a file descriptor.
"""

import os
import select
import signal
import socket
import threading
from types import FrameType


class Termination:
    """Lets a thread wait for SIGTERM. It takes no one's place: a handler of others stays.

    Note:
        Use it from the main thread.
    """

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._handles = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            and self._take_wakeup_descriptor()
        )
        if self._handles:
            signal.signal(signal.SIGTERM, _leave_it_to_the_thread)
            os.register_at_fork(after_in_child=self._forget_in_child)

    def wait(self, timeout_s: float) -> bool:
        """Waits at most so long. Returns whether this process was asked to end."""
        if not select.select([self._reader], [], [], timeout_s)[0]:
            return False
        return signal.SIGTERM in self._reader.recv(4096)

    def wake(self) -> None:
        """Ends the wait of the thread."""
        self._writer.send(b"\0")

    def close(self) -> None:
        """Restores what SIGTERM did before."""
        self._restore()
        self._reader.close()
        self._writer.close()

    def _take_wakeup_descriptor(self) -> bool:
        before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        if before != -1:
            signal.set_wakeup_fd(before)
        return before == -1

    def _restore(self) -> None:
        if not self._handles:
            return
        self._handles = False
        signal.set_wakeup_fd(-1)
        if signal.getsignal(signal.SIGTERM) is _leave_it_to_the_thread:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _forget_in_child(self) -> None:
        """A loader's worker, say, has no such thread, and must end when it is told to."""
        if os.getpid() != self._owner:
            self._restore()


def _leave_it_to_the_thread(number: int, frame: FrameType | None) -> None:
    """Stands for a handler, without which nothing is written to the descriptor."""
