"""Issue 11: names that no file system takes: one line and exit code 2, before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

import train
from launch import checklist

LONG = "n" * 300
DEEP = "/".join(["d" * 100] * 50)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--name", LONG], "name (--name) = 'nnnn"),
        (["--name", "é" * 101], "202 bytes (needed: at most 200)"),
        (["--output-dir", LONG], "output_dir (--output-dir) = 'nnnn"),
        (["--output-dir", "/tmp/" + DEEP], "a path of 5054 bytes (needed: at most 3500)"),
        (["--actor-model", LONG], "a model = 'nnnn"),
        (["--actor-model", f"./{LONG}"], "a name of 300 bytes (needed: at most 255)"),
        (["--actor-model", f"org/{LONG}"], "a name of 300 bytes (needed: at most 255)"),
        (["--reward-model", f"/x/{LONG}"], "a name of 300 bytes (needed: at most 255)"),
        (["step3.critic.model.name=" + LONG], "step3.critic.model.name = 'nnnn"),
        (["--data-path", LONG], "data.path = 'nnnn"),
        (["--data-path", f"./{LONG}.jsonl"], "a name of 306 bytes (needed: at most 255)"),
        ([f"data.cache_dir=/tmp/{LONG}"], "data.cache_dir = '/tmp/nnn"),
        (["--config", LONG], "--config = 'nnnn"),
        (["evaluate", LONG], "longer than a name may be"),
    ],
)
def test_one_line_before_anything_starts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    said: str,
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the checks began")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checklist, "check_models", never)
    monkeypatch.setattr(checklist, "look", never)
    code = train.main([*argv, *([] if argv[0] == "evaluate" else ["--dry-run"])])
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert len(err) < 200
    assert said in err
    assert list(tmp_path.iterdir()) == []


def test_what_fits_and_what_is_no_path_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    from launch.options import parse_options

    signed = f"https://host/rows.jsonl?X-Amz-Signature={LONG}"
    options = parse_options(["--name", "n" * 200, "--data-path", signed], {})
    assert options.config.data.path == [signed]
