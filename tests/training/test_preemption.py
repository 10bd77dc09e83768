"""Signals: the first one is noted, the second one ends the process, an echo of the first one does neither."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from fairhuman_jax.training.preemption import Interrupted, StopSignal, shielded

BUSY = """
import sys, time
from fairhuman_jax.training.preemption import StopSignal
with StopSignal() as stop:
    print("ready", flush=True)
    while not stop.received:
        time.sleep(0.01)
    print("noted", stop.received, flush=True)
    time.sleep(60)
"""


def wait_until(true) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_handlers_come_back(signum):
    before = signal.getsignal(signum)
    with StopSignal() as stop:
        assert stop.received == 0
        os.kill(os.getpid(), signum)
        wait_until(lambda: stop.received)
        os.kill(os.getpid(), signum)  # an echo, as launchers make them
        assert stop.received == signum
    assert signal.getsignal(signum) is before
    assert Interrupted(signum, 3).exit_code == 128 + signum
    assert f"stopped by {signal.Signals(signum).name} after step 3" in str(Interrupted(signum, 3))


def test_the_second_signal_ends_the_process_at_once():
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.stdout.readline() == f"noted {signal.SIGTERM}\n"
        time.sleep(0.7)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


def test_other_threads_change_nothing():
    found = []

    def enter():
        with StopSignal() as stop:
            found.append((stop.received, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(0, signal.getsignal(signal.SIGTERM))]


def test_children_of_a_shielded_start_do_not_get_the_signals():
    code = "import time; print('up', flush=True); time.sleep(60)"
    child = shielded(lambda: subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE))
    with child:
        assert child.stdout is not None and child.stdout.readline() == b"up\n"
        child.terminate()
        time.sleep(0.3)
        assert child.poll() is None
        child.kill()
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGTERM, signal.SIGINT}
