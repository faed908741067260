"""Console progress: a bar on a terminal, few lines elsewhere (C6)."""

from __future__ import annotations

import io

from rlhf.track import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_where_there_is_no_terminal() -> None:
    """100 updates of 1 s, a line each 10 s at most; times worked out by hand."""
    stream, clock = io.StringIO(), Clock()
    with progress(100, "step 1", 0, stream=stream, every=10.0, clock=clock) as bar:
        for step in range(100):
            clock.now += 1.0
            bar.update(1, loss=1 / (step + 1))
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue()
    assert lines[0] == "step 1: 1/100 (1%) | loss 1 | 0:01 passed, 1:39 left"
    assert lines[1] == "step 1: 11/100 (11%) | loss 0.09091 | 0:11 passed, 1:29 left"
    assert lines[-1] == "step 1: 100/100 (100%) | loss 0.01 | 1:40 passed"
    assert len(lines) == 11


def test_lines_after_a_resume_and_without_a_total() -> None:
    """The rate comes from what this process did: 10 of 50 in 20 s, so 40 more take 80 s."""
    stream, clock = io.StringIO(), Clock()
    bar = progress(100, "ppo", 0, initial=50, stream=stream, clock=clock)
    clock.now = 20.0
    bar.update(10)
    bar.write("a note")
    bar.close()
    bar.close()
    assert stream.getvalue() == "ppo: 60/100 (60%) | 0:20 passed, 1:20 left\na note\n"
    stream = io.StringIO()
    with progress(None, "rows", 0, stream=stream, clock=clock) as bar:
        bar.update(3)
        clock.now += 3700
    assert stream.getvalue() == "rows: 3 | 0:00 passed\n"


def test_hours_and_an_interrupted_run_show_the_last_state() -> None:
    stream, clock = io.StringIO(), Clock()
    with progress(3, "x", 0, stream=stream, every=9e9, clock=clock) as bar:
        bar.update()
        clock.now = 3725.0
        bar.update(reward=float("nan"))
    first, last = stream.getvalue().splitlines()
    assert first.startswith("x: 1/3")
    assert last == "x: 2/3 (67%) | reward nan | 1:02:05 passed, 31:02 left"


def test_a_bar_on_a_terminal() -> None:
    stream = Terminal()
    with progress(4, "step 1", 0, stream=stream) as bar:
        bar.update(4, loss=0.123456)
        bar.write("a note")
    text = stream.getvalue()
    assert "\r" in text
    assert "4/4" in text
    assert "loss 0.1235" in text
    assert "a note\n" in text


def test_other_ranks_are_silent() -> None:
    for stream in (Terminal(), io.StringIO()):
        with progress(4, "step 1", 1, stream=stream) as bar:
            bar.update(4, loss=1.0)
            bar.write("a note")
        assert stream.getvalue() == ""
