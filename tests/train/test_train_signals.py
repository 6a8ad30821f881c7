"""The flag that signals raise."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from halfbyte.train import signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143)])
def test_a_signal_stops_at_the_next_poll_and_not_before(number: signal.Signals, code: int) -> None:
    with signals.listen() as stop:
        stop.poll()
        os.kill(os.getpid(), number)
        with pytest.raises(signals.StopRequested) as caught:
            stop.poll()
    assert caught.value.number == number
    assert signals.exit_code(caught.value.number) == code
    assert str(caught.value) == number.name


def test_items_are_watched_one_by_one() -> None:
    handed = []
    with signals.listen() as stop, pytest.raises(signals.StopRequested):
        for item in stop.watched(range(10)):
            handed.append(item)
            if item == 3:
                os.kill(os.getpid(), signal.SIGTERM)
    assert handed == [0, 1, 2, 3]


def test_previous_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in signals.WATCHED]
    with signals.listen():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in signals.WATCHED] == before


def test_outside_the_main_thread_nothing_is_installed() -> None:
    seen = []

    def body() -> None:
        before = signal.getsignal(signal.SIGTERM)
        with signals.listen() as stop:
            seen.append(signal.getsignal(signal.SIGTERM) == before)
            stop.poll()

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [True]


def test_a_second_ctrl_c_quits_at_once_with_130() -> None:
    """In the middle of work that polls nothing."""
    script = (
        "import os, signal, time\nfrom halfbyte.train import signals\n"
        "with signals.listen() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    print('first', stop.number, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(30)\n    print('never')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert done.stdout == "first 2\n"
    assert "press Ctrl-C again to quit now" in done.stderr
