"""Ctrl-C as a request: the run saves, then ends."""

from __future__ import annotations

import signal
from types import FrameType


class Interruption:
    """While it is entered, the first SIGINT sets `is_requested`; a second one interrupts at once, as usual."""

    def __init__(self) -> None:
        self.is_requested = False

    def __enter__(self) -> Interruption:
        self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _request(self, _: int, __: FrameType | None) -> None:
        self.is_requested = True
        signal.signal(signal.SIGINT, self._previous)
