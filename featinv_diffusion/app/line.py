"""One line of work: models are not shared among threads, and clients are served in turn."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Condition, Event, Thread
from typing import Any

from featinv_diffusion.errors import InputError

logger = logging.getLogger(__name__)

MAX_WAITING, MAX_OF_CLIENT = 64, 8


class Cancelled(Exception):
    """Nobody waits for this work any more."""


class Busy(InputError):
    """The line is full; later there may be room."""


@dataclass(eq=False)
class Work:
    """Something to do for a client.

    Args:
        client: who waits for it; those who waited longest since their last turn come first.
        do: is given the work itself, whose `advance` it calls now and then.
        on_change: called from the line's thread whenever something is new.

    Attributes:
        done: share that is done.
        result: what `do` returned.
        error: what `do` raised.
    """

    client: str
    do: Callable[[Work], Any]
    on_change: Callable[[], None]
    number: int = 0
    done: float = 0.0
    result: Any = None
    error: BaseException | None = None
    is_started: bool = False
    finished: Event = field(default_factory=Event)
    _cancelled: Event = field(default_factory=Event)

    def cancel(self) -> None:
        """Stops it at its next `advance`, or before it starts."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    def advance(self, share: float) -> None:
        """Notes that so much more is done.

        Raises:
            Cancelled: nobody waits for the rest.
        """
        if self._cancelled.is_set():
            raise Cancelled
        self.done = min(1.0, self.done + share)
        self.on_change()


class Line:
    """Does work one at a time in a thread of its own."""

    def __init__(self) -> None:
        self._waiting: list[Work] = []
        self._changed = Condition()
        self._served: dict[str, int] = {}
        self._numbers = itertools.count()
        self._running: Work | None = None
        self._is_closed = False
        self._thread = Thread(target=self._run, name="featinv-app", daemon=True)
        self._thread.start()

    def add(
        self,
        client: str,
        do: Callable[[Work], Any],
        on_change: Callable[[], None] = lambda: None,
    ) -> Work:
        """Puts work at the end of the line.

        Raises:
            Busy: too much waits already, of all or of this client.
        """
        work = Work(client, do, on_change)
        with self._changed:
            self._waiting = [one for one in self._waiting if not one.is_cancelled]
            of_client = sum(one.client == client for one in self._waiting)
            if len(self._waiting) >= MAX_WAITING or of_client >= MAX_OF_CLIENT:
                raise Busy("Too much work waits already. Try again in a moment.")
            work.number = next(self._numbers)
            self._waiting.append(work)
            self._changed.notify()
        return work

    def place_of(self, work: Work) -> int:
        """Returns how many others wait or run before this work, if all stay."""
        with self._changed:
            if work not in self._waiting:
                return 0
            order = sorted(self._waiting, key=self._turn)
            return order.index(work) + 1

    def close(self) -> None:
        """Cancels everything, and ends the thread."""
        with self._changed:
            self._is_closed = True
            for work in self._waiting:
                work.cancel()
            if self._running is not None:
                self._running.cancel()
            self._changed.notify()
        self._thread.join(timeout=30)

    def _turn(self, work: Work) -> tuple[int, int]:
        return self._served.get(work.client, -1), work.number

    def _next(self) -> Work | None:
        with self._changed:
            while not self._waiting and not self._is_closed:
                self._changed.wait()
            if self._is_closed:
                return None
            work = min(self._waiting, key=self._turn)
            self._waiting.remove(work)
            self._served[work.client] = next(self._numbers)
            if len(self._served) > 1000:
                self._served.pop(min(self._served, key=self._served.__getitem__))
            work.is_started, self._running = True, work
            return work

    def _run(self) -> None:
        while (work := self._next()) is not None:
            try:
                work.advance(0.0)
                work.result = work.do(work)
                work.done = 1.0
            except Exception as error:
                work.error = error
                if not isinstance(error, InputError | Cancelled):
                    logger.exception("The app failed at some work.")
            finally:
                work.finished.set()
                work.on_change()
