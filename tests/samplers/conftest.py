"""Every test hears what time-shift says but once in a program."""

import pytest

from samplers import time_shift


@pytest.fixture(autouse=True)
def nothing_said_yet() -> None:
    time_shift.say_once.cache_clear()
