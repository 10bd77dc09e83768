"""Stopping a run by a signal: the first one asks for a checkpoint, the second ends the process."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Launchers pass a signal on that the terminal has sent to the whole group already; such an echo is no second wish.
ECHO = 0.5


class Interrupted(Exception):
    """A run that was asked to stop, and has written a checkpoint of `step` finished steps."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}; the checkpoint is complete")
        self.signum, self.step = signum, step

    @property
    def exit_code(self) -> int:
        """128 + signal number, as shells count: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + self.signum


class StopSignal:
    """While it is entered, `received` is 0, or the number of the first SIGTERM or SIGINT.

    A second signal, half a second or more after the first, ends the process at once with 128 + its number. Both are
    noticed by a thread, since Python's own handlers wait for the main one, and a compilation keeps that for minutes.
    Outside the main thread signals cannot be caught, and nothing is changed.
    """

    received: int = 0

    def __enter__(self) -> StopSignal:
        self._caught = threading.current_thread() is threading.main_thread()
        if self._caught:
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._handlers = {signum: signal.signal(signum, lambda *_: None) for signum in SIGNALS}
            self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._listen, name="stop signals", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._caught:
            signal.set_wakeup_fd(self._wakeup)
            for signum, handler in self._handlers.items():
                signal.signal(signum, handler)
            os.write(self._write, b"\0")
            self._thread.join()
            os.close(self._read)
            os.close(self._write)

    def _listen(self) -> None:
        first = 0.0
        while number := os.read(self._read, 1)[0]:
            if number not in SIGNALS:
                continue
            if not self.received:
                self.received, first = number, time.monotonic()
            elif time.monotonic() - first >= ECHO:
                os._exit(128 + number)


def shielded(start: Callable[[], T]) -> T:
    """`start()`, whose child processes never get the signals: a terminal sends Ctrl-C to loader processes as well."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
