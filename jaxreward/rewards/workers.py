"""Text rewards in processes of their own, so that no answer can stop, crash or flood a run.

A text reward is `fn(prompt, answer, record, **kw)` and returns {part: number}, or one number. It
reads what a model wrote, so it meets answers on which it hangs, crashes or takes all memory. Here
each call gets one sample and runs in a child process under a time limit; a child that is late or
dead is replaced, and that one sample counts as failed, by name.

Children are new interpreters that import the reward by its name. Nothing is forked, since JAX
holds threads; the main script does not run again in them; no JAX backend starts there. Requests
and replies are JSON, so that a child can hand the run nothing but numbers and text.
"""

import collections
import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from pathlib import Path
from typing import Any

from jaxreward.core import resolve
from jaxreward.rewards import calls

_START_LIMIT = 120.0  # seconds to import the rewards, on a busy machine too
_GRACE = 1.0  # a child ends itself when its time is up, and the parent this much later
_BLOCK = 1 << 16


@dataclasses.dataclass(frozen=True)
class Graded:
    """What one reward says about N samples.

    Attributes:
      parts: Names of the P numbers; empty while no sample has been graded and none were declared.
      values: f32[N, P], always finite; 0 in the rows of failed samples.
      ok: bool[N], False where grading failed.
      failures: {reason: number of samples}.
      details: list of N, None or what went wrong with the sample, for people.
      printed: list of N texts, the end of what the reward printed. Empty for a reward that runs in
        this process, where printing goes where it always does.
    """

    parts: tuple[str, ...]
    values: Any
    ok: Any
    failures: dict[str, int]
    details: list
    printed: list[str]


class Workers:
    """Runs text rewards in child processes; use it in a `with` block, or call `close`.

    A reward is imported by its name ("module:function"). One that has none (a lambda, a function
    written in a notebook or inside another function, one bound to values that JSON cannot hold)
    runs in this process, which is said once: there an exception still costs only its sample, but a
    hang or a crash is one of the whole run.

    A sample fails when the reward raises, is late, ends its process, runs out of memory, or does
    not return finite numbers with the parts of the others. Which parts those are is declared, or
    else decided by most samples of the first batch that has any. Working directory, environment
    and standard streams are put back before every call; whatever else a reward changes in its
    process lasts until the child is replaced.

    Children end with `close`, and with this process however it ends: one that is busy then does so
    when its call is done or its time is up. Needs a POSIX system.
    """

    def __init__(
        self,
        rewards,
        *,
        parts=None,
        workers=4,
        timeout=10.0,
        max_tasks=10_000,
        output=4096,
        memory=4 << 30,
    ):
        """Starts the children and waits until they have imported the rewards.

        Args:
          rewards: {name: callable}, for example from `resolve("rewards", ...)`.
          parts: {name of a reward: names of its parts}, or None; see the class.
          workers: Number of children; 0 runs all in this process, on purpose.
          timeout: Seconds for one call. What a reward imports only when called counts too.
          max_tasks: Calls after which a child is replaced.
          output: Bytes kept of what one call prints: the end. The rest is read and dropped.
          memory: Bytes of address space for a child, where the system can limit that; None for no
            limit.

        Raises:
          ValueError: for an argument out of range.
          RuntimeError: if a child does not start or cannot import a reward, with its own words.
        """
        for name, least, value in (
            ("workers", 0, workers),
            ("timeout", 0.01, timeout),
            ("max_tasks", 1, max_tasks),
            ("output", 0, output),
        ):
            if not value >= least:
                raise ValueError(f"{name} must be at least {least}; received {value!r}")
        if unknown := [name for name in parts or {} if name not in rewards]:
            raise ValueError(
                f"parts are given for {', '.join(unknown)}{resolve.near(unknown, rewards)} "
                f"the rewards are: {', '.join(rewards)}"
            )
        self._parts = {name: tuple(names) for name, names in (parts or {}).items()}
        self._size, self._timeout = workers, timeout
        self._max_tasks, self._output = max_tasks, output
        self._keep = max(output, 1000)  # of what a dying child prints, which says where
        self._names, self._here, remote = list(rewards), {}, {}
        for name, function in rewards.items():
            if not workers:
                self._here[name] = function
                continue
            try:
                remote[name] = calls.address(function)
            except ValueError as error:
                self._here[name] = function
                warnings.warn(
                    f"reward {name!r} runs in this process, since {error}: if it hangs or crashes, "
                    "so does the run. Write it into a module that can be imported to have it "
                    "guarded",
                    stacklevel=2,
                )
        setup = {"rewards": remote, "seconds": timeout, "memory": memory}
        self._setup = json.dumps(setup).encode() + b"\n"
        self._said, self._lock, self._closed = set(), threading.Lock(), False
        self._selector, self._crew = selectors.DefaultSelector(), []
        self._finish = weakref.finalize(self, _end_all, self._crew, self._selector)
        if remote:
            try:
                self._hire(workers)
                while not all(worker.ready for worker in self._crew):
                    self._listen({})
            except BaseException:
                self._finish()
                raise

    def grade(self, samples):
        """Grades samples with every reward.

        Args:
          samples: list of N (prompt, answer: str, record: dict); prompt and record of values that
            JSON holds. Rewards get a copy, in which tuples are lists.

        Returns:
          {name: Graded}, whole and in order whatever happened to single samples. Reasons of
          failure are said once, by name, in a warning.

        Raises:
          ValueError: for a sample that JSON cannot hold, or after `close`.
          RuntimeError: if a child cannot be replaced.
        """
        lines = [calls.line(number, *sample) for number, sample in enumerate(samples)]
        replies = {name: [None] * len(lines) for name in self._names}
        with self._lock:
            if self._closed:
                raise ValueError("these workers are closed; make new ones")
            try:
                self._work(lines, replies)
            except BaseException:
                # What is under way would answer into the next batch.
                for worker in [w for w in self._crew if w.task or not w.ready]:
                    self._end(worker)
                raise
        for name, function in self._here.items():
            replies[name] = [calls.call(name, function, json.loads(line)) for line in lines]
        graded = {}
        for name in self._names:
            graded[name] = self._graded(name, replies[name])
        return graded

    def close(self):
        """Ends all children. Closing twice is fine."""
        with self._lock:
            self._closed = True
            self._finish()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _work(self, lines, replies):
        """Hands every line for every guarded reward to a child; fills in the replies."""
        tasks = collections.deque(
            (name, number)
            for name in self._names
            if name not in self._here
            for number in range(len(lines))
        )
        busy = 0
        while tasks or busy:
            self._hire(min(self._size, busy + len(tasks)))
            for worker in list(self._crew):
                if tasks and worker.ready and worker.task is None:
                    if worker.child.poll() is None:
                        name, number = worker.task = tasks.popleft()
                        worker.send(f"[{json.dumps(name)},{lines[number]}]\n".encode())
                    else:
                        self._end(worker)
            self._listen(replies)
            busy = sum(worker.task is not None for worker in self._crew)

    def _hire(self, size):
        while len(self._crew) < size:
            self._crew.append(_Worker(self._setup, self._selector))

    def _listen(self, replies):
        """Waits for something to happen, at most until the first child is late."""
        limits = [worker.limit(self._timeout) for worker in self._crew]
        # At most a second, for a child whose pipes live on in a process that it has started.
        wait = min(1.0, max(0.0, min(limits, default=0.0) - time.monotonic()))
        events = self._selector.select(wait)
        for key, _ in events:
            worker, act = key.data
            if worker in self._crew and act(worker, self._keep):
                self._heard(worker, replies)
        now = time.monotonic()
        for worker in list(self._crew):
            late = now >= worker.limit(self._timeout)
            if late or (not events and worker.waited and worker.child.poll() is not None):
                self._lost(worker, replies, late=late)

    def _heard(self, worker, replies):
        """A child's reply is whole, or will never be."""
        if not worker.waited:  # it ended with nothing to do, so no sample is at fault
            self._end(worker)
            return
        if not worker.reply.endswith(b"\n"):
            self._lost(worker, replies)
            return
        worker.hear(self._keep, blocks=64)  # what was printed before the reply
        reply = json.loads(worker.reply)
        if worker.ready:
            self._done(worker, reply, replies)
            worker.calls += 1
            if worker.calls >= self._max_tasks:
                self._end(worker)
        elif reply["refused"]:
            self._end(worker)
            raise RuntimeError(
                f"a worker process cannot import {reply['refused']}. It looks in the same places "
                "as this process; workers=0 runs all rewards here, unguarded"
            )
        else:
            worker.ready = True

    def _lost(self, worker, replies, late=False):
        """A child is late or gone."""
        seconds = time.monotonic() - worker.since
        code = self._end(worker, patience=0.0 if late else 1.0)
        limit = self._timeout if worker.ready else _START_LIMIT
        if seconds >= limit:
            why = f"took longer than {limit:g} s"
        elif code < 0:
            killed = " (out of memory?)" if -code == signal.SIGKILL else ""
            why = f"died of {signal.Signals(-code).name}{killed}"
        else:
            why = f"exited with code {code}"
        words = worker.tail.decode(errors="replace").strip()[-500:]
        if not worker.ready:
            raise RuntimeError(f"a worker process did not start, it {why}; its words: {words}")
        detail = f"{why}: {words}" if words else why
        self._done(worker, {"failure": why, "detail": detail}, replies)

    def _done(self, worker, reply, replies):
        name, number = worker.task
        worker.task = None
        reply["printed"] = worker.tail[-self._output or len(worker.tail) :].decode(errors="replace")
        reply["heard"] = worker.heard
        replies[name][number] = reply

    def _end(self, worker, patience=0.0):
        self._crew.remove(worker)
        return worker.end(self._keep, patience)

    def _graded(self, name, replies):
        import numpy as np  # here, so that children start without it

        names = self._parts.get(name)
        kinds = collections.Counter(frozenset(r["parts"]) for r in replies if "parts" in r)
        if names is None and kinds:
            most = kinds.most_common(1)[0][0]
            names = next(tuple(r["parts"]) for r in replies if set(r.get("parts", ())) == most)
            self._parts[name] = names
        names = names or ()
        values = np.zeros((len(replies), len(names)), np.float32)
        ok = np.zeros(len(replies), bool)
        details, failures = [None] * len(replies), collections.Counter()
        for number, reply in enumerate(replies):
            found = reply.get("parts")
            if found is not None and found.keys() == set(names):
                values[number] = [found[part] for part in names]
                ok[number] = True
                continue
            other = f"gave {', '.join(found or ())} in place of {', '.join(names)}"[:200]
            reason = reply.get("failure", other)
            details[number] = reply.get("detail", other)
            failures[reason] += 1
        self._say(name, replies, details, failures)
        printed = [reply.get("printed", "") for reply in replies]
        return Graded(names, values, ok, dict(failures), details, printed)

    def _say(self, name, replies, details, failures):
        """Warns of reasons that this reward has not failed for before, and of floods."""
        new = {(name, reason) for reason in failures} - self._said
        self._said |= new
        if new:
            counts = ", ".join(f"{reason} ({count})" for reason, count in failures.most_common())
            example = next(number for number, detail in enumerate(details) if detail)
            warnings.warn(
                f"reward {name!r} failed on {sum(failures.values()):,} of {len(replies):,} "
                f"samples, whose values are 0: {counts}. Sample {example}: {details[example]}",
                stacklevel=4,
            )
        heard = max((reply.get("heard", 0) for reply in replies), default=0)
        if heard > self._output and (name, None) not in self._said:
            self._said.add((name, None))
            warnings.warn(
                f"reward {name!r} printed {heard:,} bytes about one answer; the last "
                f"{self._output:,} are kept",
                stacklevel=4,
            )


class _Worker:
    """One child and its three pipes: requests, replies, and what it prints."""

    def __init__(self, setup, selector):
        questions, self.requests = os.pipe()
        self.replies, answers = os.pipe()
        where = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        code = f"from {calls.__name__} import serve; serve({questions}, {answers})"
        try:
            self.child = subprocess.Popen(
                # -P: as in this process, the working directory is looked at only if it is in path
                [sys.executable, "-P", "-c", code],
                pass_fds=(questions, answers),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={
                    "OMP_NUM_THREADS": "1",
                    "OPENBLAS_NUM_THREADS": "1",
                    **os.environ,
                    "PYTHONPATH": where,
                    "JAX_PLATFORMS": "cpu",
                },
                start_new_session=True,  # Ctrl-C is for the parent; a kill takes grandchildren too
            )
        except OSError as error:
            os.close(self.requests)
            os.close(self.replies)
            raise RuntimeError(f"a worker process did not start: {error}") from error
        finally:
            os.close(questions)
            os.close(answers)
        self.printed = self.child.stdout.fileno()
        for end in (self.requests, self.replies, self.printed):
            os.set_blocking(end, False)
        self.selector = selector
        selector.register(self.replies, selectors.EVENT_READ, (self, _Worker.read))
        selector.register(self.printed, selectors.EVENT_READ, (self, _Worker.hear))
        self.ready, self.task, self.calls = False, None, 0
        self.send(setup)

    @property
    def waited(self):
        """Whether somebody waits for a reply of this child."""
        return not self.ready or self.task is not None

    def limit(self, timeout):
        """The time at which the child is late."""
        if not self.waited:
            return float("inf")
        return self.since + (timeout + _GRACE if self.ready else _START_LIMIT)

    def send(self, line):
        """Begins to write a request."""
        self.reply, self.tail, self.heard = bytearray(), b"", 0
        self.since, self.unsent = time.monotonic(), memoryview(line)
        self.selector.register(self.requests, selectors.EVENT_WRITE, (self, _Worker.write))
        self.write()

    def write(self, _=0):
        """Writes as much of the request as the pipe takes."""
        try:
            self.unsent = self.unsent[os.write(self.requests, self.unsent) :]
        except BlockingIOError:
            return
        except BrokenPipeError:  # the end of its replies will say so
            self.unsent = self.unsent[:0]
        if not self.unsent:
            self.selector.unregister(self.requests)

    def read(self, _=0):
        """Reads of the reply; True when that is whole, or will never be."""
        block = os.read(self.replies, _BLOCK)
        self.reply += block
        return not block or block.endswith(b"\n") or len(self.reply) > 2 * calls.LONGEST

    def hear(self, keep, blocks=1):
        """Reads of what the child prints, and keeps the last bytes."""
        for _ in range(blocks):
            try:
                block = os.read(self.printed, _BLOCK)
            except BlockingIOError:
                return
            if not block:
                self._ignore(self.printed)
                return
            self.heard += len(block)
            self.tail = (self.tail + block)[-keep:]

    def end(self, keep, patience):
        """Ends the child and what it has started; returns its exit code."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            if patience:  # it is going by itself: let it have its own exit code
                self.child.wait(patience)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()
        self.hear(keep, blocks=64)
        for end in (self.requests, self.replies, self.printed):
            self._ignore(end)
        os.close(self.requests)
        os.close(self.replies)
        self.child.stdout.close()
        return self.child.returncode

    def _ignore(self, end):
        with contextlib.suppress(KeyError):  # not looked at now
            self.selector.unregister(end)


def _end_all(crew, selector):
    while crew:
        crew.pop().end(keep=1, patience=0.0)
    selector.close()
