"""One call of a text reward, and the child process that makes such calls for `workers`.

Kept apart from `workers` so that a child loads little and starts in a tenth of a second.
"""

import contextlib
import faulthandler
import functools
import json
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path

from jaxreward.core import resolve

LONGEST = 1 << 20  # bytes of a reply
_LARGEST = 3.4028234663852886e38  # of float32


def address(function):
    """The name by which another process finds the same function.

    Args:
      function: A callable, or `functools.partial` of one with keywords only.

    Returns:
      ("module:function", keywords), the keywords of values that JSON holds.

    Raises:
      ValueError: saying why there is no such name.
    """
    keywords = {}
    while isinstance(function, functools.partial):
        if function.args:
            raise ValueError("it is bound to positional arguments")
        function, keywords = function.func, {**function.keywords, **keywords}
    module = getattr(function, "__module__", None)
    name = getattr(function, "__qualname__", None)
    if not (module and name) or "<" in name:
        raise ValueError("it is a lambda, an object or a function inside another function")
    if module == "__main__":
        raise ValueError("it is written in the notebook or script itself")
    for key, value in keywords.items():
        if not _plain(value):
            raise ValueError(f"JSON cannot hold its keyword {key}, {type(value).__name__}")
    try:
        found = resolve.resolve("rewards", f"{module}:{name}").func
    except KeyError as error:
        raise ValueError(f"{module}:{name} cannot be imported ({error.args[0]})") from error
    if found is not function:
        raise ValueError(f"importing {module}:{name} gives another function")
    return f"{module}:{name}", keywords


def line(number, prompt, answer, record):
    """A sample as JSON.

    Args:
      number: Of the sample, for messages.
      prompt: str or messages.
      answer: str.
      record: dict.

    Returns:
      The list of prompt, answer and record as one line of ASCII text.

    Raises:
      ValueError: naming what JSON cannot hold.
    """
    if not isinstance(answer, str):
        came = type(answer).__name__
        raise ValueError(f"sample {number}: the answer must be str; received {came}")
    try:
        bad = [] if _plain(prompt) else ["its prompt"]
        bad += [f"its record[{k!r}]" for k, value in record.items() if not _plain({k: value})]
        if not bad:
            return json.dumps([prompt, answer, record])
    except RecursionError:
        bad = ["it, since it is nested too deeply"]
    raise ValueError(
        f"sample {number}: JSON cannot hold {bad[0]}; give str, numbers, lists, and dicts whose "
        "keys are str"
    )


def _plain(value):
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, str | int | float)


class _Unusable(Exception):
    """A reward returned something that is no reward."""


def call(name, function, sample):
    """Calls a reward on one sample, whatever comes of it.

    Args:
      name: Of the reward; also of its part, if it returns one number.
      function: The reward.
      sample: (prompt, answer, record).

    Returns:
      {"parts": {part: float, finite in float32}}, or {"failure": reason in words that hold for
      many samples, "detail": text about this one}.
    """
    try:
        return {"parts": _parts(name, function(*sample))}
    except _Unusable as error:
        return {"failure": str(error), "detail": str(error)}
    except (Exception, SystemExit) as error:  # whatever it raises costs this one sample
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = traceback.format_exception_only(type(error), error)[-1].strip()[:500]
        text = text.encode(errors="backslashreplace").decode()
        return {
            "failure": f"raised {type(error).__name__}",
            "detail": f"{text} ({Path(last.filename).name}:{last.lineno})",
        }


def _parts(name, value):
    parts = dict(value) if isinstance(value, Mapping) else {name: value}
    if not parts:
        raise _Unusable("returned no part")
    for part, number in parts.items():
        if not isinstance(part, str):
            raise _Unusable(f"returned a part whose name is {type(part).__name__}, not str")
        if isinstance(number, str) or not hasattr(number, "__float__"):
            kind = type(number).__name__
            raise _Unusable(f"returned {kind} for {part[:80]}, not a number")
        parts[part] = float(number)
        if not abs(parts[part]) <= _LARGEST:  # NaN is not, either
            raise _Unusable(f"returned a value for {part[:80]} that is not finite in float32")
    return parts


def serve(requests, replies):
    """The child process: reads a line of set-up and then a line a call, answers each with a line.

    Args:
      requests, replies: Descriptors of its two pipes. It ends when `requests` does.
    """
    me, home, out = os.getpid(), os.open(".", os.O_RDONLY), os.dup(1)
    for end in (requests, replies):
        os.set_inheritable(end, False)
    questions, answers = os.fdopen(requests, "rb"), os.fdopen(replies, "wb")
    setup = json.loads(questions.readline())
    _limit_memory(setup["memory"])
    faulthandler.enable()  # so that a crash says where
    rewards, refused = {}, ""
    for name, (where, keywords) in setup["rewards"].items():
        try:
            rewards[name] = resolve.resolve("rewards", where, **keywords)
        except Exception as error:  # whatever importing a stranger's module raises
            refused = f"{where} (reward {name!r}): {type(error).__name__}: {error}"[:2000]
    _reply(answers, {"refused": refused})
    environ = dict(os.environ)
    for question in questions:
        name, sample = json.loads(question)
        _put_back(home, environ, out)
        # A C thread that needs no interpreter lock: it ends even a hang in C code, says where, and
        # does so when the parent is gone.
        faulthandler.dump_traceback_later(setup["seconds"], exit=True, file=2)
        content = call(name, rewards[name], sample)
        if os.getpid() != me:
            os._exit(1)  # a fork that the reward let escape
        faulthandler.cancel_dump_traceback_later()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # whatever the reward has put there
                stream.flush()
        _reply(answers, content)
    os._exit(0)  # does not wait for threads that a reward has left


def _reply(answers, content):
    text = json.dumps(content)
    if len(text) > LONGEST:
        why = f"returned more than {LONGEST >> 20} MiB"
        text = json.dumps({"failure": why, "detail": why})
    answers.write(text.encode() + b"\n")
    answers.flush()


def _limit_memory(size):
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if size is not None:
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
    except (ImportError, ValueError, OSError):
        pass  # no such limit on this system; the others stand


def _put_back(home, environ, out):
    """Undoes what the last reward may have done to folder, environment and standard streams."""
    os.fchdir(home)
    if os.environ != environ:
        os.environ.clear()
        os.environ.update(environ)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(out, number)
        setattr(sys, name, os.fdopen(number, "w", errors="backslashreplace", closefd=False))
