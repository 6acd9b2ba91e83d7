"""Drawings: what they tell, that they take turns, that they stop; the pixels are those of sample.py."""

import base64
import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ditmoe.config.policy import Policy, Rule
from ditmoe.config.sample import SampleArgs
from ditmoe.generate.request import requested
from ditmoe.launch import start
from ditmoe.play import drawing
from ditmoe.play.drawing import Drawing, Turns
from tests.ditmoe.pipeline.test_pipeline import make

QUERY = {"classes": ["class 1", "3"], "seed": ["5"], "steps": ["6"]}


def told(pipe: Any, query: dict[str, list[str]]) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    Drawing(pipe, Path("m")).draw(query, events.append, threading.Event())
    return events


def pixels(address: str) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))


def test_a_drawing_tells_its_steps_and_ends_with_the_pixels_of_sample_py() -> None:
    pipe = make()
    start, *steps, done = told(pipe, QUERY)
    assert start["start"]["names"] == ["class 1", "class 3"]
    assert start["start"]["calls"] == 6
    assert [one["step"]["k"] for one in steps] == [*range(6)]
    times = [one["step"]["t"] for one in steps]
    assert times == sorted(times, reverse=True)
    args = SampleArgs(Path("m"), classes=(1, 3), seed=5, steps=6, precision="fp32")
    expected = requested(args, pipe).batch(range(2))
    assert np.array_equal([pixels(image) for image in done["done"]["images"]], expected[..., 0])
    assert done["done"]["seconds"] > 0
    assert np.array_equal(pixels(steps[-1]["step"]["clean"][0]), expected[0, ..., 0])  # ddim ends at its prediction


def test_the_map_is_that_of_the_images_with_their_labels() -> None:
    pipe, seen = make(), []
    (_, first, *_, last) = told(pipe, {**QUERY, "cfg": ["3"]})
    pipe.transformer.register_forward_hook(lambda _net, _given, made: seen.append(made.routing[0].served()))
    pipe([1, 3], seed=5, num_inference_steps=6, guidance_scale=3.0)
    n, t, bits = first["step"]["experts"][0]
    assert (n, t, len(seen[0])) == (2, 4, 4)  # the guided pass is of four images
    served = np.unpackbits(np.frombuffer(base64.b64decode(bits), np.uint8))[: n * 4 * t].reshape(n, 4, t)
    assert np.array_equal(served, seen[0][:2].numpy().transpose(0, 2, 1))
    assert served.sum() == 2 * 4 * pipe.transformer.config.top_k
    assert "done" in last


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ({"classes": ["clas 1"]}, "there is no class 'clas 1'; did you mean 'class 1'"),
        ({"classes": ["1"], "sampler": ["dimm"]}, "did you mean 'ddim'"),
        ({"classes": ["1"], "steps": ["1000000000"]}, "1000000000"),
        ({"classes": ["1"], "cfg": ["nan"]}, "guidance_scale is nan"),
        ({"classes": ["1"], "cfg": ["1"], "guidance-interval": ["0", "9"]}, "do nothing at guidance_scale 1"),
        ({"classes": ["1"], "seed": ["-1"]}, "seed"),
        ({"classes": ["1"], "tau": ["0.3"]}, "tau is for models"),
        ({"num": ["2"]}, "num is for models without labels"),
    ],
)
def test_a_bad_value_is_a_sentence_and_leaves_the_place_free(query: dict[str, list[str]], sentence: str) -> None:
    pipe = make()
    (*_, last) = told(pipe, query)
    assert sentence in last["error"]
    assert "done" in told(pipe, QUERY)[-1]


def test_a_model_without_labels_draws_a_number() -> None:
    assert len(told(make(num_classes=0), {"num": ["3"]})[-1]["done"]["images"]) == 3


def test_drawings_are_in_float32_where_auto_is_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, plain = make(), told(make(), QUERY)[-1]["done"]["images"]
    pipe.register_modules(guide=make().transformer)
    monkeypatch.setattr(start, "_is_fast_cpu", lambda: True)
    for _ in range(2):  # the first one leaves the network as it was
        assert told(pipe, {**QUERY, "guide-scale": ["1"]})[-1]["done"]["images"] == plain


def test_a_policy_is_parsed_once_a_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[Any] = []
    monkeypatch.setattr(Policy, "from_dict", lambda data: parsed.append(data) or Policy((Rule(1, 0, "suppress"),)))
    assert "done" in told(make(), {**QUERY, "policy": ['{"rules": [1]}']})[-1]
    assert parsed == [{"rules": [1]}]


def test_turns_go_round() -> None:
    turns, order = Turns(), []
    turns.take()
    waiting = []
    for name in "abc":
        waiting.append(threading.Thread(target=lambda name=name: (turns.take(), order.append(name), turns.end())))
        waiting[-1].start()
        while turns._given < 1 + len(waiting):
            pass
    turns.end()
    for thread in waiting:
        thread.join(10)
    assert order == ["a", "b", "c"]


def test_a_long_drawing_does_not_hold_up_a_short_one_and_stops_when_told_to() -> None:
    page, stopped, begun, seen = Drawing(make(), Path("m")), threading.Event(), threading.Event(), []

    def tell(event: dict[str, Any]) -> None:
        seen.append(event)
        if "step" in event:
            begun.set()

    long = threading.Thread(target=page.draw, args=({**QUERY, "steps": ["1000"]}, tell, stopped))
    long.start()
    assert begun.wait(30)
    short: list[dict[str, Any]] = []
    page.draw(QUERY, short.append, threading.Event())
    assert "done" in short[-1]
    assert long.is_alive()
    stopped.set()
    long.join(30)
    assert not long.is_alive()
    assert not any("done" in event for event in seen)


def test_more_drawings_than_there_are_places_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "MOST_DRAWINGS", 1)
    page, events = Drawing(make(), Path("m")), []
    page.draw(QUERY, lambda event: page.draw(QUERY, events.append, threading.Event()), threading.Event())
    assert {event["error"] for event in events} == {"1 drawings are under way here; try again when one has ended"}
    page.draw(QUERY, events.append, threading.Event())
    assert "done" in events[-1]
