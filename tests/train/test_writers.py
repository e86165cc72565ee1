"""metrics.jsonl survives kills, is valid JSON, and progress reads well on both kinds of stream."""

import io
import json
import logging
import sys
from types import SimpleNamespace

import pytest

from jaxreward import cli
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
    progress.update(8, None, "1,234 tokens/s", "MFU n/a")
    progress.update(10)
    progress.close()
    assert out.getvalue() == (
        "train 7/10  loss 0.1235  accuracy 1  6 s left\n"
        "train 8/10  3 s left  1,234 tokens/s  MFU n/a\n"
        "train 10/10\n"
    )


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


def test_a_live_line_does_not_wrap(clock, monkeypatch):
    """Catches a narrow terminal that fills with the beginnings of lines."""
    monkeypatch.setenv("COLUMNS", "20")
    out = Terminal()
    progress = writers.Progress(10, label="x", stream=out)
    progress.update(9, {"loss": 1.25}, "1,234 tokens/s")
    progress.close()
    assert out.getvalue() == "\rx 9/10  loss 1.25  \n"


# Levels


SAID = ("a fact", "some information", "warning: a warning", "error: an error")


def talk(level):
    """Says one thing at each level, and lets a library do so."""
    ours, theirs = logging.getLogger("jaxreward.x"), logging.getLogger("orbax.x")
    with writers.log_level(level):
        writers.say("a fact")
        ours.info("some information")
        ours.debug("details")
        ours.warning("a warning")
        ours.error("an error")
        theirs.debug("their details")
        theirs.warning("their warning")


@pytest.fixture
def others(monkeypatch):
    """What reaches the handlers of the root logger, which are not ours."""
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    return out


@pytest.mark.parametrize(
    ("level", "expected", "library"),
    [
        ("info", SAID, ["their warning"]),
        ("warning", SAID[2:], ["their warning"]),
        ("error", SAID[3:], []),
        (
            "debug",
            (*SAID[:2], "debug: details", *SAID[2:]),
            ["their details", "their warning"],
        ),
    ],
)
def test_what_is_printed_at_which_level(level, expected, library, capsys, others):
    """Catches a library that floods a run, a line that stands twice, and silence on an error."""
    talk(level)
    assert capsys.readouterr().err.splitlines() == list(expected)
    assert others.getvalue().splitlines() == library


def test_libraries_are_heard_in_debug_without_a_handler(capsys, monkeypatch):
    """Catches --log_level debug that shows nothing of jax, whose loggers have no handler."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    talk("debug")
    err = capsys.readouterr().err
    assert "debug: orbax.x: their details\nwarning: orbax.x: their warning\n" in err


def test_a_level_ends_with_its_command(capsys, others):
    """Catches a notebook or a test that a command leaves mute."""
    loggers = [logging.getLogger(name) for name in ("jaxreward", "")]
    before = [(x.level, x.propagate, list(x.handlers)) for x in loggers]
    for level in writers.LEVELS:
        with pytest.raises(KeyError):
            with writers.log_level(level):
                raise KeyError
    assert [(x.level, x.propagate, x.handlers) for x in loggers] == before
    assert logging.root.manager.disable == logging.NOTSET and writers.says()


def test_progress_is_information(clock):
    """Catches a quiet run that still writes a line a step."""
    out = io.StringIO()
    with writers.log_level("warning"):
        writers.Progress(10, stream=out).update(1)
    assert out.getvalue() == ""


def test_a_message_does_not_continue_the_live_line(capsys, monkeypatch, clock):
    """Catches "1 s leftwarning: …", and an error message glued to the last progress."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with writers.log_level("info"):
        progress = writers.Progress(10, label="x")
        progress.update(1)
        logging.getLogger("jaxreward.x").warning("skipped")
        progress.update(10)
    print("error", file=sys.stderr)
    assert capsys.readouterr().err == "\rx 1/10  0 s left\nwarning: skipped\n\rx 10/10\nerror\n"


def test_every_command_takes_a_level(tmp_path, capsys, monkeypatch):
    """Catches a flag that is parsed and not used, and a level nobody knows."""
    said = []
    level = lambda *_: said.append(logging.getLogger("jaxreward").level)
    monkeypatch.setattr("jaxreward.report.page.write", level)
    argv = ["report", "--workdir", str(tmp_path)]
    assert cli.main(argv) == 0 and cli.main([*argv, "--log_level", "error"]) == 0
    assert said == [logging.INFO, logging.ERROR]
    assert cli.main([*argv, "--log_level", "loud"]) == 2
    assert "choose from" in capsys.readouterr().err
    for command in cli._COMMANDS:
        assert cli.main([command, "--help"]) == 0
        assert "--log_level" in capsys.readouterr().out
