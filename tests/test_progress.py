"""The time left is known as soon as two pieces are done, however slow they are."""

import io

import pytest
from rich.console import Console

from vlm_tune import console
from vlm_tune.console import Estimate, duration, follow


@pytest.mark.parametrize(
    ("times", "left"),
    [
        ([60], ""),
        ([90, 150], "8 min 00 s left"),  # the first took 90 seconds, since it also warmed up: it does not count
        ([1, 2, 3], "7 s left"),
        ([3600, 7200], "8 h 00 min left"),
        ([5, 5.5], "4 s left"),
    ],
)
def test_the_time_left_is_known_after_two_pieces(times, left):
    estimate = Estimate(10)
    said = [estimate.advance(done, now) for done, now in enumerate(times, 1)]
    assert said[-1] == left
    assert said[0] == ""


def test_a_resumed_run_estimates_from_its_own_steps():
    estimate = Estimate(100)
    assert estimate.advance(41, 10.0) == ""
    assert estimate.advance(42, 40.0) == "29 min 00 s left"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (3599.7, "1 h 00 min"), (7500, "2 h 05 min")],
)
def test_seconds_are_written_as_people_read_them(seconds, text):
    assert duration(seconds) == text


def test_a_log_file_gets_lines_with_rate_and_time_left(monkeypatch, capsys):
    clock = iter(range(0, 10**6, 20))
    monkeypatch.setattr(console.time, "perf_counter", lambda: next(clock))
    assert list(follow(range(4), "encoding pictures", "rows")) == [0, 1, 2, 3]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "encoding pictures: 1 of 4, 0.1 rows/s"
    assert lines[1] == "encoding pictures: 2 of 4, 0.1 rows/s  40 s left"


def test_a_terminal_gets_a_bar(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(console, "make_console", lambda stderr: Console(file=screen, force_terminal=True, width=100))
    assert list(follow([1, 2, 3], "encoding pictures", "rows")) == [1, 2, 3]
    assert "encoding pictures" in screen.getvalue()
