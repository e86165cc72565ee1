"""Text rewards in child processes: whatever one sample does, the batch comes back."""

import functools
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest

from jaxreward.core import resolve
from jaxreward.rewards.workers import Workers

REWARDS = '''
import ctypes, os, re, signal, subprocess, sys, threading, time

LEFT = []

def odd(prompt, answer, record):
    """Does what the answer says."""
    if answer == "exit": os._exit(3)
    if answer == "killed": os.kill(os.getpid(), signal.SIGKILL)
    if answer == "segfault": os.kill(os.getpid(), signal.SIGSEGV)
    if answer == "hang in C": re.match("(a+)+$", "a" * 40 + "b")
    if answer == "deaf":  # stops the child's own clock and the signals that ask
        import faulthandler
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    if answer == "raise": raise ValueError("bad \\ud800 answer")
    if answer == "sys.exit": sys.exit(0)
    if answer == "recursion": odd(prompt, answer, record)
    if answer == "memory": bytearray(1 << 33)
    if answer == "NaN": return {"a": float("nan"), "b": 1.0}
    if answer == "inf": return {"a": 1.0, "b": float("-inf")}
    if answer == "too large for float32": return {"a": 1.0, "b": 1e39}
    if answer == "None": return None
    if answer == "text": return {"a": "1", "b": 0.0}
    if answer == "function": return {"a": lambda: 1.0, "b": 0.0}
    if answer == "unnamed": return {1: 1.0, "b": 0.0}
    if answer == "one part": return {"a": 1.0}
    if answer == "three parts": return {"a": 1.0, "b": 0.0, "c": 0.0}
    if answer == "no part": return {}
    if answer == "many parts": return {str(n): 1.0 for n in range(100_000)}
    if answer == "flood":
        for _ in range(100): print("x" * 999_999)
    if answer == "flood of a grandchild": subprocess.run(["head", "-c", "5000000", "/dev/zero"])
    if answer == "thread": threading.Thread(target=time.sleep, args=(60,)).start()
    if answer == "fork":
        child = os.fork()
        if child == 0: return {"a": 9.0, "b": 9.0}
        print(child)
    if answer == "litter":
        os.chdir("/")
        os.environ["LITTER"] = "1"
        del os.environ["PATH"]
        LEFT.append(1)
        os.close(1)
        sys.stderr.close()
        sys.stdout = None
    if answer == "look":
        clean = os.getcwd() != "/" and "LITTER" not in os.environ and "PATH" in os.environ
        return {"a": float(clean), "b": float(len(LEFT))}
    if answer == "orphan":
        print(subprocess.Popen(["sleep", "60"]).pid, flush=True)
        os._exit(0)
    if answer == "read": return {"a": float(len(sys.stdin.read())), "b": 0.0}
    print("read", answer)
    return {"a": 1, "b": 0.5}

def length(prompt, answer, record, *, scale=1.0): return scale * len(answer)
def pid(prompt, answer, record): return {"pid": os.getpid() % 2**20}
def loaded(prompt, answer, record):
    return {"jax": "jax" in sys.modules, "cpu": os.environ["JAX_PLATFORMS"] == "cpu"}
def right(prompt, answer, record): return {"right": answer == record["gold"]}
def nap(prompt, answer, record):
    if answer == "0":
        threading.Timer(0.2, os._exit, [1]).start()
    time.sleep(float(answer))
    return float(answer)
'''

GOOD = {"a": 1.0, "b": 0.5}
# What the answer does -> part of the reason, or the parts that come back all the same.
CASES = {
    "exit": "exited with code 3",
    "killed": "died of SIGKILL",
    "segfault": "died of SIGSEGV",
    "hang in C": "took longer than 2 s",
    "deaf": "took longer than 2 s",
    "raise": "raised ValueError",
    "sys.exit": "raised SystemExit",
    "recursion": "raised RecursionError",
    "memory": "raised MemoryError",
    "NaN": "returned a value for a that is not finite",
    "inf": "returned a value for b that is not finite",
    "too large for float32": "returned a value for b that is not finite",
    "None": "returned NoneType",
    "text": "returned str for a",
    "function": "returned function for a",
    "unnamed": "returned a part whose name is int",
    "one part": "gave a in place of a, b",
    "three parts": "gave a, b, c in place of a, b",
    "no part": "returned no part",
    "many parts": "returned more than 1 MiB",
    "flood": GOOD,
    "flood of a grandchild": GOOD,
    "thread": GOOD,
    "fork": GOOD,
    "litter": GOOD,
    "read": {"a": 0.0, "b": 0.0},
}


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """The rewards above as a module that can be imported, as a user's is."""
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "odd_rewards.py").write_text(REWARDS, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        import odd_rewards

        yield odd_rewards
    del sys.modules["odd_rewards"]


@pytest.fixture(scope="module")
def odd(module):
    """One batch with every case, each followed by a good sample; and its warnings."""
    samples = [("p", answer, {}) for case in CASES for answer in (case, "good")]
    with Workers({"odd": module.odd}, workers=2, timeout=2.0, output=64) as workers:
        with pytest.warns(UserWarning) as said:
            graded = workers.grade(samples)["odd"]
    return graded, [str(warning.message) for warning in said]


@pytest.fixture(scope="module")
def small(module):
    """Two children for what goes well."""
    rewards = {"length": functools.partial(module.length, scale=0.5), "pid": module.pid}
    with Workers({**rewards, "right": module.right}, workers=2) as workers:
        yield workers


def gone(pid):
    """Whether a process has ended; one that waits to be collected has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def await_end(children, seconds):
    """Fails unless all have ended after that time."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends and not all(map(gone, children)):
        time.sleep(0.02)
    assert all(map(gone, children)), [pid for pid in children if not gone(pid)]


def pids(workers):
    return [worker.child.pid for worker in workers._crew]


@pytest.mark.parametrize("case", CASES)
def test_a_bad_sample_costs_itself_alone(odd, case):
    """Catches a sample that takes the batch, its neighbour, or a value with it."""
    graded, _ = odd
    number, expected = 2 * list(CASES).index(case), CASES[case]
    assert graded.parts == ("a", "b")
    assert graded.ok[number + 1], graded.details[number + 1]
    np.testing.assert_array_equal(graded.values[number + 1], [1.0, 0.5])
    if isinstance(expected, str):
        assert not graded.ok[number]
        assert expected in " ".join(graded.failures)
        assert graded.details[number]
        np.testing.assert_array_equal(graded.values[number], 0.0)
    else:
        assert graded.ok[number], graded.details[number]
        np.testing.assert_array_equal(graded.values[number], list(expected.values()))


def test_failures_are_counted_and_said_once(odd):
    """Catches silent failures, counts that do not add up, and one warning a sample."""
    graded, said = odd
    bad = [case for case, expected in CASES.items() if isinstance(expected, str)]
    assert sum(graded.failures.values()) == len(bad) == (~graded.ok).sum()
    assert graded.failures["took longer than 2 s"] == 2
    assert graded.failures["raised ValueError"] == 1
    assert np.isfinite(graded.values).all() and graded.values.dtype == np.float32
    (warning,) = [text for text in said if "failed" in text]
    assert f"reward 'odd' failed on {len(bad)} of {len(graded.ok)}" in warning
    assert "took longer than 2 s (2)" in warning and "exited with code 3 (1)" in warning


def test_details_say_where(odd):
    """Catches a failure that cannot be found in the reward: a line for hang, crash and raise."""
    graded, _ = odd
    details = dict(zip(CASES, graded.details[::2]))
    assert "odd_rewards.py" in details["hang in C"] and "in odd" in details["hang in C"]
    assert "odd_rewards.py" in details["segfault"]
    assert details["raise"].startswith("ValueError: bad")
    assert "(odd_rewards.py:" in details["raise"]
    for detail in filter(None, details.values()):
        detail.encode()  # no half surrogates


def test_printing_is_kept_to_its_end(odd):
    """Catches a pipe that fills up, memory that does, and a flood that nobody hears of."""
    graded, said = odd
    printed = dict(zip(CASES, graded.printed[::2]))
    assert printed["flood"].endswith("xxx\nread flood\n") and len(printed["flood"]) == 64
    assert len(printed["flood of a grandchild"]) == 64
    assert graded.printed[1] == "read good\n"
    (warning,) = [text for text in said if "printed" in text]
    assert "'odd' printed 100,000,011 bytes about one answer; the last 64 are kept" in warning


def test_a_reward_finds_its_process_as_it_was(module):
    """Catches folder, environment and closed streams that outlive the sample which changed them."""
    samples = [("p", answer, {}) for answer in ("litter", "look", "good")]
    with Workers({"odd": module.odd}, workers=1) as workers:
        graded = workers.grade(samples)["odd"]
    np.testing.assert_array_equal(graded.values, [[1.0, 0.5], [1.0, 1.0], [1.0, 0.5]])
    assert graded.printed[2] == "read good\n"


def test_what_a_reward_has_started_ends(module):
    """Catches processes that pile up: one of a dead child, and a fork that goes its own way."""
    with Workers({"odd": module.odd}, workers=1) as workers:
        with pytest.warns(UserWarning, match=r"failed on 1 of 2 .* exited with code 0"):
            graded = workers.grade([("p", "orphan", {}), ("p", "fork", {})])["odd"]
        await_end([int(printed.split()[0]) for printed in graded.printed], 2.0)


def test_a_reward_of_a_config_is_guarded():
    """Catches a function of `resolve`, bound to keywords, that is taken for one without a name."""
    reward = resolve.resolve("rewards", "verdict.agreement", choices=("A", "B", "tie"))
    answer = "<think>equal</think><answer>tie</answer>"
    with Workers({"verdict": reward}, workers=1) as workers:
        assert workers._crew
        graded = workers.grade([("p", answer, {"label": "tie"})])["verdict"]
    assert graded.parts == ("accuracy", "format", "read")
    assert graded.values.tolist() == [[1.0, 1.0, 1.0]]


def test_order_and_names(small):
    """Catches replies that reach another sample or another reward."""
    answers = ["x" * (n * 37 % 101) for n in range(300)]
    graded = small.grade([("p", a, {"gold": "x" * 37}) for a in answers])
    assert list(graded) == ["length", "pid", "right"]
    np.testing.assert_array_equal(graded["length"].values[:, 0], [len(a) / 2 for a in answers])
    np.testing.assert_array_equal(graded["right"].values[:, 0], [len(a) == 37 for a in answers])
    assert graded["length"].parts == ("length",) and graded["right"].parts == ("right",)
    assert all(g.ok.all() and not g.failures for g in graded.values())


def test_large_and_odd_texts_arrive_whole(small):
    """Catches a pipe that blocks on an answer larger than it, and text that JSON would break."""
    answers = ["y" * 3_000_000, "a\nb\u2028c", "\ud800", ""]
    graded = small.grade([([{"role": "user", "content": "q"}], a, {"gold": a}) for a in answers])
    np.testing.assert_array_equal(graded["right"].values[:, 0], 1.0)
    np.testing.assert_array_equal(graded["length"].values[:, 0], [1.5e6, 2.5, 0.5, 0.0])


def test_no_samples(small):
    """Catches an empty batch that waits for ever or has no shape."""
    graded = small.grade([])["right"]
    assert graded.values.shape[0] == 0 and graded.failures == {}


def test_two_thousand_checks_take_less_than_three_seconds(small):
    """Catches a sleep or a new process a sample; the best of three, for busy machines."""
    samples = [("p", str(n % 3), {"gold": "1"}) for n in range(2048)]
    names, small._names = small._names, ["right"]
    try:
        times = []
        while len(times) < 3 and min(times, default=9.0) > 3.0:
            began = time.monotonic()
            assert small.grade(samples)["right"].values.sum() == 683
            times.append(time.monotonic() - began)
    finally:
        small._names = names
    assert min(times) < 3.0, times


def test_children_run_at_the_same_time_and_load_no_jax(module):
    """Catches children in a queue, and one that would start a backend of its own."""
    with Workers({"nap": module.nap, "loaded": module.loaded}, workers=4) as workers:
        began = time.monotonic()
        graded = workers.grade([("p", "0.8", {})] * 4)
        assert time.monotonic() - began < 2.8  # one after the other takes 3.2
        assert len(set(pids(workers))) == 4
    np.testing.assert_array_equal(graded["loaded"].values, [[0.0, 1.0]] * 4)


def test_a_child_is_replaced_after_so_many_calls(module):
    """Catches max_tasks ignored."""
    with Workers({"pid": module.pid}, workers=1, max_tasks=2) as workers:
        values = workers.grade([("p", "", {})] * 5)["pid"].values[:, 0].tolist()
    assert values[0] == values[1] and values[2] == values[3]
    assert len(set(values)) == 3


def test_a_child_that_died_in_between_costs_nothing(small):
    """Catches a sample blamed for the death of an idle child."""
    for pid in pids(small):
        os.kill(pid, signal.SIGKILL)
    await_end(pids(small), 2.0)
    assert small.grade([("p", "ab", {"gold": "ab"})] * 6)["right"].values.sum() == 6


def test_a_child_that_dies_while_another_works_costs_nothing(module):
    """Catches the last reply of a child taken for one more when its pipe ends."""
    with Workers({"nap": module.nap}, workers=2) as workers:
        graded = workers.grade([("p", "0", {}), ("p", "0.6", {})])["nap"]
        assert graded.ok.all() and len(workers._crew) == 1
        assert workers.grade([("p", "0.01", {})] * 2)["nap"].ok.all()


def test_an_interrupted_batch_does_not_answer_into_the_next(module):
    """Catches replies left in a pipe after Ctrl-C, which would grade other samples."""
    with Workers({"nap": module.nap}, workers=2) as workers:
        timer = threading.Timer(
            0.3, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]
        )
        # A shell that starts the tests in the background has SIGINT ignored.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                workers.grade([("p", "0.6", {}), ("p", "20", {})])
            timer.join()
        finally:
            signal.signal(signal.SIGINT, before)
        values = workers.grade([("p", "0.01", {}), ("p", "0.02", {})])["nap"].values
    np.testing.assert_allclose(values[:, 0], [0.01, 0.02], rtol=1e-6)


def test_parts_are_those_of_most_samples_or_as_declared(module):
    """Catches one odd first sample that makes all the others wrong, and a shape that varies."""
    rewards = {"odd": module.odd}
    samples = [("p", answer, {}) for answer in ("one part", "good", "good")]
    with Workers(rewards, workers=1) as workers:
        with pytest.warns(UserWarning, match=r"gave a in place of a, b \(1\)"):
            graded = workers.grade(samples)["odd"]
        assert graded.ok.tolist() == [False, True, True]
    with Workers(rewards, workers=1, parts={"odd": ["a", "b"]}) as workers:
        with pytest.warns(UserWarning, match="failed on 1 of 1"):
            graded = workers.grade(samples[:1])["odd"]
        assert graded.parts == ("a", "b") and graded.values.tolist() == [[0.0, 0.0]]
        workers.grade(samples[:1])  # the same failure is not said again


@pytest.mark.parametrize(
    ("reward", "why"),
    [
        (lambda prompt, answer, record: 1 / len(answer), "a lambda"),
        (functools.partial(lambda p, a, r, *, n: n / len(a), n=1), "a lambda"),
        (functools.partial(int, "7"), "positional"),
        (functools.partial(resolve.near, known={1, 2}), "JSON cannot hold its keyword known, set"),
    ],
)
def test_what_has_no_name_runs_here_and_says_so(reward, why):
    """Catches a notebook's function refused, or run without a word about what that means."""
    with pytest.warns(UserWarning, match=f"'mine' runs in this process, since .*{why}"):
        workers = Workers({"mine": reward}, workers=2)
    with workers:
        assert not workers._crew


def test_here_an_exception_costs_its_sample_too():
    """Catches a batch lost to one exception, and a reward that changes the caller's record."""

    def mine(prompt, answer, record):
        record["gold"].append(answer)
        return {"inverse": 1 / len(answer)}

    record = {"gold": ["x"]}
    with Workers({"mine": mine}, workers=0) as workers:
        with pytest.warns(UserWarning, match=r"raised ZeroDivisionError \(1\)"):
            graded = workers.grade([("p", "ab", record), ("p", "", record)])["mine"]
    assert graded.ok.tolist() == [True, False] and graded.values[:, 0].tolist() == [0.5, 0.0]
    assert record == {"gold": ["x"]}


def test_a_function_of_a_script_is_not_looked_for_in_modules(tmp_path):
    """Catches __main__ run again in the children, with the training that it starts."""
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent("""
            import warnings
            from jaxreward.rewards.final_number import final_number
            from jaxreward.rewards.workers import Workers
            print("script runs")
            def mine(prompt, answer, record): return float(answer)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                workers = Workers({"mine": mine, "other": final_number}, workers=2)
            with workers:
                print(len(said), "notebook or script" in str(said[0].message), len(workers._crew))
                print(workers.grade([("p", "2", {})])["mine"].values.tolist())
        """)
    )
    run = [sys.executable, "-W", "ignore", str(script)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["script runs", "1 True 2", "[[2.0]]"], done.stderr


def test_close_ends_all_children(module):
    """Catches children left behind by close, by a second close, or by forgetting to close."""
    workers = Workers({"pid": module.pid}, workers=2)
    children = pids(workers)
    workers.close()
    workers.close()
    assert all(map(gone, children))
    with pytest.raises(ValueError, match="closed; make new ones"):
        workers.grade([])
    forgotten = Workers({"pid": module.pid}, workers=1)
    children = pids(forgotten)
    del forgotten
    gc.collect()
    assert all(map(gone, children))


def test_children_end_with_a_parent_that_is_killed(module):
    """Catches orphans: an idle one at once, a hanging one when its time is up."""
    code = textwrap.dedent("""
        import odd_rewards
        from jaxreward.rewards.workers import Workers
        workers = Workers({"odd": odd_rewards.odd}, workers=2, timeout=2.0)
        print(*[worker.child.pid for worker in workers._crew], flush=True)
        workers.grade([("p", "hang in C", {})])
    """)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env) as parent:
        children = [int(pid) for pid in parent.stdout.readline().split()]
        time.sleep(0.5)
        parent.kill()
    assert len(children) == 2
    await_end(children, 8.0)


def test_a_reward_that_children_cannot_import_stops_the_start(monkeypatch):
    """Catches a pool that starts without its reward, and children left behind by that."""

    def seen(prompt, answer, record):
        return 1.0

    seen.__module__, seen.__qualname__ = "ghost_rewards", "seen"
    ghost = types.ModuleType("ghost_rewards")
    ghost.seen = seen
    monkeypatch.setitem(sys.modules, "ghost_rewards", ghost)
    with pytest.raises(RuntimeError, match=r"cannot import ghost_rewards:seen \(reward 'g'\)"):
        Workers({"g": seen}, workers=2)


@pytest.mark.parametrize(
    ("sample", "text"),
    [
        (("p", None, {}), "sample 1: the answer must be str; received NoneType"),
        ((b"p", "a", {}), "sample 1: JSON cannot hold its prompt"),
        (("p", "a", {"gold": "x", "image": np.zeros(2)}), r"its record\['image'\]"),
        (("p", "a", {"gold": "x", "by": {3: "y"}}), r"its record\['by'\]; .* keys are str"),
    ],
)
def test_a_sample_that_json_cannot_hold_is_named(small, sample, text):
    """Catches a record that reaches the reward as something else."""
    with pytest.raises(ValueError, match=text):
        small.grade([("p", "a", {"gold": "x"}), sample])


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"workers": -1}, "workers must be at least 0; received -1"),
        ({"timeout": 0.0}, "timeout must be at least 0.01"),
        ({"timeout": float("nan")}, "timeout must be at least 0.01"),
        ({"max_tasks": 0}, "max_tasks must be at least 1"),
        ({"output": -1}, "output must be at least 0"),
        ({"parts": {"lenght": ["x"]}}, "given for lenght; did you mean length"),
    ],
)
def test_arguments_are_checked(module, given, text):
    """Catches a pool that would hang or never grade anything."""
    with pytest.raises(ValueError, match=text):
        Workers({"length": module.length}, **given)
