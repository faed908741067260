"""The benchmarks' arithmetic: ratios, order of the sides, a side in another process."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks.pairs import Measurement, compare, print_line, worker


def test_ratios_by_hand():
    """Ours 10, 20, 30 per second against a constant 10; by CPU time each is half as long."""
    speeds = iter([99.0, 10.0, 20.0, 30.0])
    order = []

    def ours():
        order.append("ours")
        return Measurement(next(speeds), 1.0, 0.5)

    def theirs():
        order.append("theirs")
        return Measurement(10.0, 1.0, 1.0)

    result = compare(ours, theirs, pairs=3)
    assert result["median_ratio"] == 2.0
    assert result["spread"] == [1.0, 3.0]
    assert result["cpu_median_ratio"] == 4.0
    assert result["cpu_spread"] == [2.0, 6.0]
    assert result["ours"]["per_second"] == 20.0
    # The warm-up (99) is not counted; afterwards the first of each pair alternates.
    assert order == ["ours", "theirs"] * 2 + ["theirs", "ours"] + ["ours", "theirs"]


def test_a_side_measured_here():
    result = compare(lambda: sum(range(200_000)) and 8.0, lambda: sum(range(200_000)) and 8.0)
    assert 0.1 < result["cpu_median_ratio"] < 10
    assert result["theirs"]["seconds"] > 0


CODE = "from benchmarks.pairs import serve\nprint('noise')\nserve(lambda: print('x') or {work})"


def test_a_side_in_another_process():
    with worker([sys.executable, "-c", CODE.format(work=5.0)]) as side:
        assert side().work == 5.0
        assert side().seconds > 0
    assert side._process.returncode == 0


def test_a_side_that_fails_ends_the_benchmark():
    with (
        worker([sys.executable, "-c", CODE.format(work="1 / 0")]) as side,
        pytest.raises(SystemExit, match="ended with code 1"),
    ):
        side()


def test_one_line_of_json(capsys):
    print_line("x", {"rows": 3}, {"median_ratio": 2.0})
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    line = json.loads(out)
    assert line["settings"] == {"rows": 3}
    assert line["median_ratio"] == 2.0
    assert "cores" in line["machine"]
