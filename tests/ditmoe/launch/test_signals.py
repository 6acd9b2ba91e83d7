"""What a signal does, in this process."""

import signal
from contextlib import suppress

import pytest

from ditmoe.launch.signals import Interrupted, Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_it_is_noted_or_raised_and_handlers_come_back(number: int) -> None:
    before = signal.getsignal(number)
    with Signals() as signals:
        assert not signals.received
        signal.raise_signal(number)
        signal.raise_signal(number)  # handed on by a launcher
        assert signals.received == signal.Signals(number).name
        with pytest.raises(Interrupted), signals.raising():
            raise AssertionError("not reached")
    assert signal.getsignal(number) is before


def test_no_library_swallows_it() -> None:
    with pytest.raises(Interrupted), Signals(raising=True), suppress(Exception):
        signal.raise_signal(signal.SIGTERM)


def test_what_came_where_nothing_can_be_raised_is_known_later() -> None:
    class Dying:
        def __del__(self) -> None:
            with suppress(BaseException):  # as Python does in a finaliser
                signal.raise_signal(signal.SIGTERM)

    with Signals(raising=True):
        Dying()
        with Signals() as inner:
            assert inner.received == "SIGTERM"


def test_what_came_when_nobody_looked_any_more_is_raised_outside() -> None:
    with pytest.raises(Interrupted), Signals(raising=True), Signals():
        signal.raise_signal(signal.SIGTERM)
