"""metrics.jsonl survives kills, is valid JSON, and progress reads well on both kinds of stream."""

import io
import json
from types import SimpleNamespace

import pytest

from jaxreward.train import writers


def lines(folder):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_not_finite_is_null(tmp_path):
    """Catches NaN and Infinity in the file, which no JSON reader has to accept."""
    file = writers.MetricsFile(tmp_path)
    file.write(1, {"a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": 0.5, "e": 3})
    # Read before close: every line must be on its way to the disk when a kill comes.
    assert lines(tmp_path) == [{"step": 1, "a": None, "b": None, "c": None, "d": 0.5, "e": 3}]
    file.close()


def test_a_line_cut_short_is_dropped(tmp_path):
    """Catches a resume that fails on, or keeps, what a kill left half written."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 2.0}\n{"step": 2, "a": 0.12')
    file = writers.MetricsFile(tmp_path, step=2)
    file.write(2, {"a": 5.0})
    file.close()
    assert lines(tmp_path) == [{"step": 1, "a": 2.0}, {"step": 2, "a": 5.0}]


def test_a_whole_last_line_without_newline_is_kept(tmp_path):
    """Catches two objects glued together on one line."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 2.0}')
    file = writers.MetricsFile(tmp_path, step=1)
    file.write(2, {})
    file.close()
    assert lines(tmp_path) == [{"step": 1, "a": 2.0}, {"step": 2}]


@pytest.mark.parametrize(("step", "kept"), [(0, []), (2, [1, 2, 2]), (9, [1, 2, 2, 3])])
def test_lines_beyond_the_restored_step_are_dropped(tmp_path, step, kept):
    """Catches steps that stand twice after a resume, and a comparison that is off by one."""
    text = "".join(json.dumps({"step": s}) + "\n" for s in (1, 2, 2, 3))
    (tmp_path / "metrics.jsonl").write_text(text)
    writers.MetricsFile(tmp_path, step=step).close()
    assert [line["step"] for line in lines(tmp_path)] == kept
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]  # no partial file left


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (-3, "0 s"),
        (42.4, "42 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (90000, "25 h 00 min"),
    ],
)
def test_duration(seconds, text):
    """Catches "60 s", "3 min 5 s" and minutes above 59."""
    assert writers.duration(seconds) == text


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(writers, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_plain_lines_off_a_terminal(clock):
    """Catches carriage returns in log files, and time left that counts steps of an earlier run."""
    out = io.StringIO()
    progress = writers.Progress(10, start=4, label="train", stream=out)
    clock[0] += 6.0
    progress.update(7, {"loss": 0.123456, "accuracy": 1.0})  # 3 steps in 6 s; 3 are left
    progress.update(10)
    progress.close()
    assert out.getvalue() == "train 7/10  loss 0.1235  accuracy 1  6 s left\ntrain 10/10\n"


def test_one_live_line_on_a_terminal(clock):
    """Catches the tail of a longer line that stays visible behind a shorter one."""
    out = Terminal()
    progress = writers.Progress(10, label="x", stream=out)
    progress.close()
    assert out.getvalue() == ""  # nothing shown, nothing to end
    progress.update(9, {"loss": 1.25})
    progress.update(10)
    progress.close()
    first = "x 9/10  loss 1.25  0 s left"
    assert out.getvalue() == f"\r{first}\r{'x 10/10'.ljust(len(first))}\n"
