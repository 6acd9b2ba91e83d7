"""The command: what it refuses, where it serves, what a browser gets."""

import asyncio
import json
import signal
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import urlopen

import pytest

from ditmoe import pipeline
from ditmoe.config import play
from ditmoe.play import serve
from ditmoe.play.drawing import MOST_DRAWINGS, Drawing
from tests.ditmoe.pipeline.test_pipeline import make
from tests.doors import command
from tests.processes import door, start


def get(
    app: Any, path: str, query: str = "", host: str = "127.0.0.1:7860", **more: str
) -> tuple[int, dict[str, str], str]:
    """Status, headers and text of an answer, without a socket."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "http_version": "1.1", "method": "GET", "path": path, "raw_path": path.encode(),
        "root_path": "", "query_string": query.encode(), "scheme": "http",
        "headers": [(name.replace("_", "-").encode(), one.encode()) for name, one in {"host": host, **more}.items()],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 7860), "asgi": {"version": "3.0"},
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, b"".join(part.get("body", b"") for part in sent[1:]).decode()


@pytest.fixture(scope="module")
def app() -> Any:
    return serve.application(Drawing(make(), Path("<script>alert(1)</script>")))


def test_the_page_needs_nothing_from_elsewhere_and_names_stay_text(app: Any) -> None:
    status, headers, text = get(app, "/")
    assert status == 200
    assert "http://" not in text
    assert "https://" not in text
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "<script>alert" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 2


def test_a_drawing_is_a_stream_of_events(app: Any) -> None:
    status, headers, text = get(app, "/draw", "classes=1&steps=3")
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert [list(event) for event in events] == [["start"], ["step"], ["step"], ["step"], ["done"], []]
    *_, error, end = get(app, "/draw", "classes=99")[2].split("\n\n")[:-1]
    assert "label 99 is out of range" in error
    assert end == "data: {}"


def test_another_sites_name_for_this_address_is_refused(app: Any) -> None:
    assert get(app, "/", host="evil.example")[0] == 400
    assert get(app, "/", host="localhost:7860")[0] == 200
    assert get(app, "/", host="[::1]:7860")[0] == 200
    page = Drawing(make(), Path("m"))
    anybody, studio = (serve.application(page, serve.names_of("Studio", a)) for a in ("0.0.0.0", "192.0.2.7"))
    assert get(anybody, "/", host="studio.example")[0] == 200
    answers = [get(studio, "/", host=host)[0] for host in ("studio:7860", "192.0.2.7:7860", "studio.example")]
    assert answers == [200, 200, 400]


def test_a_page_of_another_site_can_neither_draw_nor_hold_this_one(app: Any) -> None:
    assert "frame-ancestors 'none'" in get(app, "/")[1]["content-security-policy"]
    for told in (
        {"origin": "https://evil.example"}, {"origin": "null"}, {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"}, {"origin": "http://127.0.0.1:8000", "sec_fetch_site": "same-origin"},
    ):  # fmt: skip
        assert get(app, "/draw", "classes=1&steps=1", **told)[::2] == (403, "another site's page may not draw here")
    for told in ({"sec_fetch_site": "same-origin", "origin": "http://127.0.0.1:7860"}, {"sec_fetch_site": "none"}):
        assert '"done"' in get(app, "/draw", "classes=1&steps=1", **told)[2]


def test_a_drawing_stops_when_its_stream_is_closed() -> None:
    page = Drawing(make(), Path("m"))

    async def leave() -> None:
        stream: AsyncIterator[str] = serve.events(page, {"classes": ["1"], "steps": ["1000"]})
        assert "start" in await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(leave())
    for _ in range(MOST_DRAWINGS):  # all places are free again
        assert page._places.acquire(timeout=20)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_drawings_and_the_server_at_once(tmp_path: Path, number: int) -> None:
    pipeline.save(make(), tmp_path / "model")
    served = start(door, "ditmoe", ["play", str(tmp_path / "model"), "--port", "0"], folder=tmp_path / "served")
    served.until(lambda: "Ctrl-C" in served.out())
    (where,) = (word for word in served.out().split() if word.startswith("http://"))
    rules = [{"layer": 1, "expert": 0, "action": "suppress", "steps": [step, step]} for step in range(1000)]
    long = urlopen(f"{where}/draw?classes=1&steps=2&policy={quote(json.dumps({'rules': rules}))}", timeout=20)
    assert b"rule for expert 0 of layer 1 begins at step 2" in long.read()  # and not 400, without a word
    stream = urlopen(f"{where}/draw?classes=1&steps=1000", timeout=20)
    assert b"start" in stream.readline()
    began = time.monotonic()
    served.kill(number)
    assert stream.read().endswith(b'data: {"error": "ditmoe play was ended"}\n\ndata: {}\n\n')
    assert served.wait(20) == [143]
    assert time.monotonic() - began < 5
    assert "Traceback" not in served.err()
    assert "running task" not in served.err()


def test_mistakes_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    pipeline.save(make(), tmp_path / "model")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert command("play", tmp_path, "--port", port) == 2
    assert f"cannot serve at 127.0.0.1, port {port}" in capsys.readouterr().err
    assert command("play", tmp_path / "nothing", "--port", 0) == 2
    assert "holds no model" in capsys.readouterr().err
    assert command("play", tmp_path, "--port", 70000) == 2
    assert "port is 70000; it must be in 0..65535" in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert command("play", tmp_path, "--host", "no.such.host.invalid") == 2
    assert "cannot serve at no.such.host.invalid" in capsys.readouterr().err
    monkeypatch.setattr(play, "find_spec", lambda name: None)
    assert command("play", tmp_path) == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "play needs starlette and uvicorn; install what it needs: pip install 'ditmoe[play]'" in said
