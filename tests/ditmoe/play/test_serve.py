"""The command: what it refuses, where it serves, what a browser gets."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ditmoe import pipeline
from ditmoe.config import play
from ditmoe.play import serve
from ditmoe.play.drawing import MOST_DRAWINGS, Drawing
from tests.ditmoe.test_pipeline import make
from tests.doors import command


def get(app: Any, path: str, query: str = "", host: str = "127.0.0.1:7860") -> tuple[int, dict[str, str], str]:
    """Status, headers and text of an answer, without a socket."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "http_version": "1.1", "method": "GET", "path": path, "raw_path": path.encode(),
        "root_path": "", "query_string": query.encode(), "headers": [(b"host", host.encode())], "scheme": "http",
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
    assert get(serve.application(Drawing(make(), Path("m")), local=False), "/", host="studio.example")[0] == 200


def test_a_drawing_stops_when_its_stream_is_closed() -> None:
    page = Drawing(make(), Path("m"))

    async def leave() -> None:
        stream: AsyncIterator[str] = serve.events(page, {"classes": ["1"], "steps": ["1000"]})
        assert "start" in await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(leave())
    for _ in range(MOST_DRAWINGS):  # all places are free again
        assert page._places.acquire(timeout=20)


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
