"""The page's server: one page, one stream of events a drawing, nothing from elsewhere.

A drawing is a thread that ends when the browser closes its stream.
"""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route

from ..config.play import PlayArgs
from ..pipeline import load
from .drawing import Drawing
from .settings import described

HERE = ("127.0.0.1", "localhost", "::1")  # addresses of this machine alone
LONGEST = 2**20  # bytes of an address with its policy
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
OWN = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "frame-ancestors 'none'"
)


def run(args: PlayArgs) -> None:
    """Load the model and serve its page until a signal comes. ValueError where the port cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        listening = socket.create_server((args.host, args.port), family=family)
    except OSError as error:
        why = f"cannot serve at {args.host}, port {args.port} ({error.strerror or error})"
        raise ValueError(f"{why}; give another one with --port, or --port 0 for any") from error
    with listening:
        drawing = Drawing(load(args.model, fast=True), args.model)
        app = application(drawing, names_of(args.host, listening.getsockname()[0]))
        where = (f"[{args.host}]" if ":" in args.host else args.host) + f":{listening.getsockname()[1]}"
        print(f"a page to play with {args.model}: http://{where}  (Ctrl-C ends it)", flush=True)
        if args.host not in HERE:
            print(f"everybody who can reach {args.host} can draw with this machine", flush=True)
        config = uvicorn.Config(
            app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1, http="h11",
            h11_max_incomplete_event_size=LONGEST,
        )  # fmt: skip
        Server(config, drawing).run(sockets=[listening])


class Server(uvicorn.Server):
    """Ends the drawings before it waits for their streams to end."""

    def __init__(self, config: uvicorn.Config, drawing: Drawing) -> None:
        super().__init__(config)
        self.drawing = drawing

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As of uvicorn."""
        for end in [*self.drawing.ends]:
            end()
        await super().shutdown(sockets)


def names_of(host: str, address: str) -> list[str]:
    """The names that a page of this host, bound to this address, may be asked for by; "*" is any."""
    if address in ("0.0.0.0", "::"):
        return ["*"]
    own = [] if host in HERE else [host, address, socket.gethostname(), socket.getfqdn(host)]
    return [name.lower() for name in (*HERE, *own)]


def _from_elsewhere(request: Request) -> bool:
    """Whether another site's page asks, as its browser says."""
    site, origin = request.headers.get("sec-fetch-site", "none"), request.headers.get("origin")
    return site not in ("none", "same-origin") or (origin is not None and urlsplit(origin).netloc != request.url.netloc)


def application(drawing: Drawing, names: Sequence[str] = HERE) -> Starlette:
    """`/`, the page, and `/draw?...`, a drawing as server-sent events; to who asks by one of these names of the host.

    A drawing that another site's page asks for is refused, and so is any other name for this address.
    """
    room = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    text = room.get_template("page.html").render(model=described(drawing.pipe, drawing.model))

    async def page(_: Request) -> Response:
        return HTMLResponse(text, headers={**HEADERS, "Content-Security-Policy": OWN})

    async def draw(request: Request) -> Response:
        if _from_elsewhere(request):
            return Response("another site's page may not draw here", 403, HEADERS)
        asked = request.query_params
        query = {name: asked.getlist(name) for name in asked}
        return StreamingResponse(events(drawing, query), media_type="text/event-stream", headers=HEADERS)

    guard = Middleware(TrustedHostMiddleware, allowed_hosts=[f"[{name}]" if ":" in name else name for name in names])
    return Starlette(routes=[Route("/", page), Route("/draw", draw)], middleware=[guard])


async def events(drawing: Drawing, query: dict[str, list[str]]) -> AsyncIterator[str]:
    """What a drawing tells, as server-sent events, the last of them empty; the drawing stops where this is closed."""
    loop, told, stopped = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any] | None](), Event()

    def tell(event: dict[str, Any] | None) -> None:
        if not stopped.is_set():
            loop.call_soon_threadsafe(told.put_nowait, event)

    def work() -> None:
        try:
            drawing.draw(query, tell, stopped)
        finally:
            tell(None)

    def end() -> None:
        tell({"error": "ditmoe play was ended"})
        tell(None)
        stopped.set()

    drawing.ends.add(end)
    Thread(target=work, daemon=True).start()
    try:
        while (event := await told.get()) is not None:
            yield f"data: {json.dumps(event)}\n\n"
        yield "data: {}\n\n"
    finally:
        stopped.set()
        drawing.ends.discard(end)
