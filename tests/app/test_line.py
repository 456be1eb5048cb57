"""The one line of work: order among clients, cancelling, limits."""

from __future__ import annotations

from threading import Event

import pytest

from featinv_diffusion.app.line import MAX_OF_CLIENT, Busy, Cancelled, Line, Work


@pytest.fixture
def line():
    made = Line()
    yield made
    made.close()


def hold(line: Line) -> tuple[Work, Event]:
    """Occupies the line until the event is set."""
    free, started = Event(), Event()

    def do(_work: Work) -> None:
        started.set()
        assert free.wait(10)

    work = line.add("holder", do)
    assert started.wait(10)
    return work, free


def test_clients_are_served_in_turn_and_each_in_order(line: Line) -> None:
    _, free = hold(line)
    done: list[str] = []
    works = [
        line.add(name[0], lambda _, name=name: done.append(name))
        for name in ("a1", "a2", "a3", "b1")
    ]
    assert [line.place_of(work) for work in works] == [1, 2, 3, 4]
    free.set()
    assert all(work.finished.wait(10) for work in works)
    assert done == ["a1", "b1", "a2", "a3"]


def test_cancelled_work_stops_at_its_next_step_or_never_starts(line: Line) -> None:
    running, go = Event(), Event()
    steps: list[float] = []

    def do(work: Work) -> None:
        work.advance(0.25)
        steps.append(work.done)
        running.set()
        assert go.wait(10)
        work.advance(0.25)
        steps.append(work.done)

    work, waiting = line.add("a", do), line.add("a", lambda _: steps.append(9))
    assert running.wait(10)
    work.cancel()
    waiting.cancel()
    go.set()
    assert work.finished.wait(10)
    last = line.add("a", lambda _: "result")
    assert last.finished.wait(10)
    assert isinstance(work.error, Cancelled)
    assert steps == [0.25]
    assert last.result == "result"


def test_a_client_that_asks_too_much_is_told_so_and_others_are_served(line: Line) -> None:
    _, free = hold(line)
    for _ in range(MAX_OF_CLIENT):
        line.add("greedy", lambda _: None)
    with pytest.raises(Busy, match="Try again"):
        line.add("greedy", lambda _: None)
    other = line.add("other", lambda _: 1)
    free.set()
    assert other.finished.wait(10)
    assert other.result == 1


def test_an_error_ends_its_work_alone(line: Line, caplog: pytest.LogCaptureFixture) -> None:
    work = line.add("a", lambda _: 1 / 0)
    assert work.finished.wait(10)
    assert isinstance(work.error, ZeroDivisionError)
    assert "failed" in caplog.text
    after = line.add("a", lambda _: 2)
    assert after.finished.wait(10)
    assert after.result == 2
