"""The log of a run: which rows are written, and what it adds to them."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from ditmoe.config.sections import Config
from ditmoe.run_folder import log as module
from ditmoe.run_folder.log import Log, read_rows

Tiny = Callable[..., Config]


def test_images_a_second_leave_pauses_out_and_skipped_steps_in(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config, now = tiny(max_steps=4), [100.0]
    config.out.mkdir()
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    with Log(config, 0, shown=True) as log:
        for step in (1, 2):
            now[0] += 2.0
            assert log.count(step)
            if step == 1:
                log.write({"step": 1, "loss": None, "skipped_steps": 1, "faults": ["x"]})
        with log.paused():
            now[0] += 50.0
        log.write({"step": 2, "loss": 1.5, "grad_norm": 1.0})
    skipped, row = map(json.loads, (config.out / "metrics.jsonl").read_text().splitlines())
    assert skipped == {"step": 1, "loss": None, "skipped_steps": 1, "faults": ["x"]}
    assert row == {"step": 2, "loss": 1.5, "grad_norm": 1.0, "images_per_second": 2 * config.train.batch_size / 4}
    assert [row["step"] for row in read_rows(config.out / "metrics.jsonl")] == [2]


def test_rows_are_due_every_so_many_steps_and_at_the_end_and_only_one_process_writes(tiny: Tiny) -> None:
    config = tiny(max_steps=205, train={"log_every": 50})
    config.out.mkdir()
    with Log(config, 0, shown=False) as log:
        assert [step for step in range(1, 206) if log.count(step)] == [50, 100, 150, 200, 205]
        log.write({"step": 50, "loss": 1.0})
    assert not list(config.out.iterdir())
    with Log(replace(config, max_steps=200), 0, shown=False) as log:
        assert all(log.count(step) for step in range(1, 201))
