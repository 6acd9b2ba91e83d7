"""Draws what pages ask for, step by step and page by page in turn, and tells what happens.

Shapes: N images, C channels, H W size, T tokens of an image, E experts; n images with decisions of their own, N or 1.
"""

import base64
import io
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import BoundedSemaphore, Condition, Event
from typing import Any

import numpy as np
from torch import Tensor

from ..data.pixels import to_pil, to_pixels, visible
from ..generate.draw import Pixels
from ..generate.pictures import spread
from ..generate.request import requested
from ..moe import Routing
from ..pipeline import DiTMoEPipeline
from .settings import Query, command, python, read

MOST_DRAWINGS = 12  # at once, of all pages
MOST_FRAMES = {True: 12, False: 100}  # steps that are shown of one drawing: with a VAE to decode them, and without

Tell = Callable[[dict[str, Any]], None]


class Stopped(Exception):  # noqa: N818 - nobody's error
    """Nobody looks at this drawing any more."""


class Turns:
    """A lock that goes round among those who want it, in the order in which they came."""

    def __init__(self) -> None:
        self._changed, self._given, self._turn = Condition(), 0, 0

    def take(self) -> None:
        """Wait for the next free turn."""
        with self._changed:
            mine, self._given = self._given, self._given + 1
            self._changed.wait_for(lambda: self._turn == mine)

    def end(self) -> None:
        """Let the next one have it."""
        with self._changed:
            self._turn += 1
            self._changed.notify_all()


class Drawing:
    """One model, and drawings of it that take turns, a step each: a long one does not hold up a short one."""

    def __init__(self, pipe: DiTMoEPipeline, model: Path) -> None:
        self.pipe, self.model = pipe, model
        self._turns, self._places = Turns(), BoundedSemaphore(MOST_DRAWINGS)
        self.ends: set[Callable[[], None]] = set()  # of each drawing under way, what ends it
        self._routing: list[Routing] = []  # of the last network call
        pipe.transformer.register_forward_hook(self._note)

    def _note(self, _net: Any, _given: Any, made: Any) -> None:
        self._routing = made.routing or self._routing  # a pass without routed experts has none

    def draw(self, query: Query, tell: Tell, stopped: Event) -> None:
        """Draw what an address asks for, until `stopped`; tells a start, steps, the end or an error: JSON values."""
        if not self._places.acquire(blocking=False):
            return tell({"error": f"{MOST_DRAWINGS} drawings are under way here; try again when one has ended"})
        try:
            with suppress(Stopped):
                self._draw(query, tell, stopped)
        except (ValueError, FloatingPointError) as error:
            tell({"error": str(error)})
        finally:
            self._places.release()

    def _draw(self, query: Query, tell: Tell, stopped: Event) -> None:
        args, policy = read(query, self.model)
        if args.num is not None and self.pipe.transformer.config.num_classes:
            raise ValueError("num is for models without labels; give the classes of the images")
        self._turns.take()
        try:
            wanted = requested(args, self.pipe)
            calls, names = wanted.sampler["nfe"], self.pipe.id2label
            labels = wanted.labels or [0] * wanted.num
            shown = set(spread(calls, MOST_FRAMES[self.pipe.vae is not None]))
            tell({
                "start": {
                    "calls": calls, "names": [names.get(c, "" if wanted.labels is None else str(c)) for c in labels],
                    "command": command(query, args, policy), "python": python(query, args, policy),
                }
            })  # fmt: skip
            seconds, began = 0.0, time.perf_counter()

            def after(k: int, t: Tensor, x_t: Tensor, x_0: Tensor | None) -> None:
                nonlocal seconds, began
                seconds += time.perf_counter() - began
                if k in shown:
                    tell(self._frame(k, float(t), x_t, x_t if x_0 is None else x_0))
                self._turns.end()
                self._turns.take()
                if stopped.is_set():
                    raise Stopped
                began = time.perf_counter()

            options = {**wanted.options, "callback": after, "policy": policy}
            images = replace(wanted, options=options).batch(range(wanted.num))
            seconds += time.perf_counter() - began
            tell({"done": {"images": [_png(image) for image in visible(images)], "seconds": seconds}})
        finally:
            self._turns.end()

    def _frame(self, k: int, t: float, x_t: Tensor, x_0: Tensor) -> dict[str, Any]:
        """What is to be seen after step k."""
        noisy, clean = ([_png(image) for image in visible(to_pixels(self.pipe.decode(x)))] for x in (x_t, x_0))
        experts, E = [], self.pipe.transformer.config.num_experts
        for record in self._routing:
            served = record.served()[: len(x_t), :, :E].cpu().numpy()  # with the label; those without it come after
            bits = np.packbits(served.transpose(0, 2, 1) > 0)  # (n, E, t): n or t is 1 where all share a decision
            experts.append([len(served), served.shape[1], base64.b64encode(bits.tobytes()).decode()])
        return {"step": {"k": k, "t": t, "noisy": noisy, "clean": clean, "experts": experts}}


def _png(image: Pixels) -> str:
    """uint8 (H, W, C) as a data address."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
