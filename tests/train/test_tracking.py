"""What follows a run: event files that read well after a resume, a W&B that may break, a profile;
and what a run says about where it comes from."""

import json
import struct
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jaxreward import presets, testing
from jaxreward.core import provenance
from jaxreward.models import decoder
from jaxreward.parallel import specs as sp
from jaxreward.train import plan, tracking
from jaxreward.train.loop import Stopped


def section(**changes):
    """The section `train` of a config."""
    return SimpleNamespace(**presets.train(**changes))


def lines(folder):
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


def warned(caplog):
    return [r.getMessage() for r in caplog.records if r.name == tracking.__name__]


# TensorBoard


def events(folder):
    """[[event, ...] of each file in the order of names], read without any of our own code."""
    from tensorboardX.proto import event_pb2

    found = []
    for path in sorted(folder.iterdir()):
        data, at, made = path.read_bytes(), 0, []
        while at < len(data):
            (size,) = struct.unpack("<Q", data[at : at + 8])
            made.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + size]))
            at += 16 + size
        found.append(made)
    return found


def curves(folder):
    """{name: [(step, value)]} as TensorBoard reads them: a start makes it forget later steps."""
    from tensorboardX.proto.event_pb2 import SessionLog

    out = {}
    for event in (event for made in events(folder) for event in made):
        if event.session_log.status == SessionLog.START:
            out = {k: [p for p in points if p[0] < event.step] for k, points in out.items()}
        for value in event.summary.value:
            out.setdefault(value.tag, []).append((event.step, value.simple_value))
    return out


def test_events_stand_once_after_a_resume(tmp_path):
    """Catches a curve that runs back and forth, an old file written over, and a lost step."""
    train = section(tensorboard=True)
    with tracking.Metrics(tmp_path, train, step=0, facts={}) as metrics:
        for step in (1, 2, 3):
            metrics.write(step, {"train/loss": step / 2, "train/lr": 0.25})
        metrics.write(3, {"eval/x": 1.0})
        assert len(curves(tmp_path / "tensorboard")["train/loss"]) == 3  # before a kill
    with tracking.Metrics(tmp_path, train, step=2, facts={}) as metrics:
        metrics.write(3, {"train/loss": 7.0, "train/lr": 0.25})
    assert len(events(tmp_path / "tensorboard")) == 2
    assert curves(tmp_path / "tensorboard") == {
        "train/loss": [(1, 0.5), (2, 1.0), (3, 7.0)],
        "train/lr": [(1, 0.25), (2, 0.25), (3, 0.25)],
        "eval/x": [],
    }
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    """Catches every host writing event files, and a run on W&B for each of them."""
    monkeypatch.setitem(sys.modules, "wandb", stub())
    train = section(tensorboard=True, wandb="p")
    with tracking.Metrics(tmp_path, train, step=0, facts={}, writes=False) as metrics:
        metrics.write(1, {"a": 1.0})
    assert list(tmp_path.iterdir()) == [] and sys.modules["wandb"].calls == []


def test_a_full_disk_ends_the_events_and_not_the_run(tmp_path, monkeypatch, caplog):
    """Catches hours of training lost to a curve nobody looks at."""
    with tracking.Metrics(tmp_path, section(tensorboard=True), step=0, facts={}) as metrics:
        metrics.write(1, {"a": 1.0})

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(tracking.TensorBoard, "write", full)
        metrics.write(2, {"a": 2.0})
        metrics.write(3, {"a": 3.0})
    (said,) = warned(caplog)
    assert said.startswith("TensorBoard: OSError: ") and said.endswith("the run goes on without it")
    assert [line["a"] for line in lines(tmp_path)] == [1.0, 2.0, 3.0]


# Weights & Biases


def stub(breaks="", at=0, starting_step=0, error=RuntimeError):
    """A module `wandb` that keeps its calls; `breaks` ("init", "log", "finish") raises, a log only
    at step `at`."""
    made = ModuleType("wandb")
    made.calls = []

    def call(name, **kw):
        made.calls.append((name, kw))
        if name == breaks and kw.get("step", at) == at:
            raise error("no network; api_key=abc123")

    def init(**kw):
        call("init", **kw)
        return SimpleNamespace(
            starting_step=starting_step,
            url=None,
            log=lambda values, step: call("log", values=values, step=step),
            finish=lambda exit_code: call("finish", exit_code=exit_code),
        )

    made.init = init
    return made


def follow(folder, *, step=0, last=3, **kw):
    """Logs the steps after `step` with a stub; returns its calls by name."""
    module = stub(**kw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", module)
        with tracking.Metrics(folder, section(wandb="p"), step=step, facts={"jax": "1"}) as metrics:
            for at in range(step + 1, last + 1):
                metrics.write(at, {"a": float(at)})
    names = [name for name, _ in module.calls]
    return names, [kw for _, kw in module.calls]


def test_a_resumed_run_goes_on_with_its_run(tmp_path):
    """Catches a new run at every start, and a config or facts that are not uploaded."""
    presets.save({"optim": {"lr": 0.5}}, tmp_path / "config.json")
    names, (first, *logs, end) = follow(tmp_path)
    assert names == ["init", "log", "log", "log", "finish"]
    assert (first["project"], first["resume"], first["dir"]) == ("p", "allow", str(tmp_path))
    assert first["config"] == {"optim": {"lr": 0.5}, "environment": {"jax": "1"}}
    assert first["settings"]["x_disable_meta"] and first["settings"]["disable_git"]
    assert logs == [{"values": {"a": float(n)}, "step": n} for n in (1, 2, 3)]
    assert end == {"exit_code": 0}
    # From step 1 again, where 3 steps are there: those are not sent twice.
    names, (again, *logs, _) = follow(tmp_path, step=1, last=5, starting_step=4)
    assert again["id"] == first["id"] == (tmp_path / "wandb_id").read_text().strip()
    assert [log["step"] for log in logs] == [4, 5]


@pytest.mark.parametrize(
    ("breaks", "names"),
    [
        ("init", ["init"]),
        ("log", ["init", "log", "log", "finish"]),
        ("finish", ["init", "log", "log", "log", "finish"]),
    ],
)
def test_whatever_it_raises_is_said_once(tmp_path, breaks, names, caplog):
    """Catches a run that a network ends, one that warns at every step, and a key in the log."""
    assert follow(tmp_path, breaks=breaks, at=2)[0] == names
    assert [line["a"] for line in lines(tmp_path)] == [1.0, 2.0, 3.0]
    assert warned(caplog) == [
        "Weights & Biases: RuntimeError: no network; api_key=***; the run goes on without it"
    ]


@pytest.mark.parametrize(
    ("error", "code"), [(FloatingPointError("x"), 1), (KeyboardInterrupt(), 1), (Stopped("x"), 0)]
)
def test_a_failed_run_is_marked_so(tmp_path, monkeypatch, error, code):
    """Catches a diverged run that looks finished, and a preempted one that looks broken."""
    monkeypatch.setitem(sys.modules, "wandb", stub())
    with pytest.raises(type(error)):
        with tracking.Metrics(tmp_path, section(wandb="p"), step=0, facts={}):
            raise error
    assert sys.modules["wandb"].calls[-1] == ("finish", {"exit_code": code})


@pytest.mark.parametrize("module", [None, ModuleType("wandb")])
def test_a_missing_package_is_an_error_at_the_start(tmp_path, monkeypatch, module):
    """Catches a run that notices after hours, and the folder ./wandb taken for the package."""
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(ImportError, match=r"train\.wandb .*pip install 'jaxreward\[logging\]'"):
        tracking.check(section(wandb="p"))
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"train\.tensorboard .*'jaxreward\[logging\]'"):
        tracking.Metrics(tmp_path, section(tensorboard=True), step=0, facts={})
    assert list(tmp_path.iterdir()) == []
    with tracking.Metrics(tmp_path, section(), step=0, facts={}):  # not asked for
        pass


# Profile


@pytest.fixture
def traced(monkeypatch):
    """What the profiler is told, without a trace."""
    said = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: said.append("on"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: said.append("off"))
    return said


@pytest.mark.parametrize(
    ("first", "count", "start", "expected"),
    [
        (0, 0, 0, []),
        (0, 2, 0, [2, 3]),
        (1, 1, 0, [1]),
        (3, 1, 0, [3]),
        (2, 3, 2, [4]),  # step 3 compiles in a resumed run
        (2, 2, 2, []),
        (1, 9, 2, []),
        (0, 2, 5, []),
        (5, 9, 0, [5, 6]),
    ],
)
def test_which_steps_are_traced(traced, first, count, start, expected):
    """Catches a window off by one, a trace of a compilation, and one that is never ended."""
    profile, inside = tracking.Profile("x", first, count, start=start), []
    for step in range(start + 1, 7):
        profile.before(step, jnp.zeros(()))
        if traced[-1:] == ["on"]:
            inside.append(step)
        profile.after(step, jnp.zeros(()))
    profile.close()
    assert inside == expected and traced == (["on", "off"] if expected else [])


@pytest.mark.parametrize(("first", "count"), [(3, 0), (-1, 2), (0, -2)])
def test_a_profile_that_traces_nothing_is_refused(first, count):
    """Catches a wish that is dropped in silence."""
    with pytest.raises(ValueError, match=f"profile_steps={count}, profile_from={first}"):
        tracking.check(section(profile_from=first, profile_steps=count))


# FLOPs


def gradient(remat):
    """The traced gradient of a tiny decoder's states."""
    cfg = testing.tiny_config(remat=remat)

    def loss(params, tokens, positions):
        x = jnp.take(params["embed"]["table"], tokens, axis=0)
        segments = jnp.ones_like(tokens)
        kw = dict(positions=positions, segments=segments, trunk=jnp.zeros_like(tokens))
        return jnp.sum(jnp.square(decoder.backbone(params, cfg, x, rules=None, **kw).states))

    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    params = sp.abstract(decoder.specs(cfg))
    return jax.jit(jax.grad(loss)).trace(params, ints(2, 16), ints(2, 16, 1))


def test_what_is_computed_again_is_no_work():
    """Catches an MFU that rises when a run recomputes more, and a JAX that names it otherwise."""
    none, full = gradient("none"), gradient("full")
    assert plan.flops(full) > 1.2 * plan.flops(none)
    assert plan.flops(full, recomputed=False) == plan.flops(none, recomputed=False)
    assert plan.flops(none, recomputed=False) == plan.flops(none) > 0


def test_the_peak_is_known_or_none():
    """Catches an invented peak, and one chip's for all of them."""
    of = lambda *kinds: [SimpleNamespace(device_kind=kind) for kind in kinds]
    assert plan.peak(of("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3")) == 2 * 989e12
    assert plan.peak(of("TPU v5 lite")) == 197e12 and plan.peak(of("TPU v5")) == 459e12
    assert plan.peak(of("TPU v4", "TPU v9")) is None
    assert plan.peak(of("NVIDIA H100 80GB HBM3 MIG 1g.10gb")) is None
    assert plan.peak(jax.devices()) is None  # the CPU


# Provenance


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("--api_key=abc def", "--api_key=***"),
        ("WANDB_API_KEY=abc", "WANDB_API_KEY=***"),
        ("--config.hub.token=abc", "--config.hub.token=***"),
        ("--Password=1234", "--Password=***"),
        ("https://me:pw@host.org/x?token=abc&y=2", "https://***@host.org/x?token=***&y=2"),
        ("s3://b/k?X-Amz-Signature=ab&x=1", "s3://b/k?X-Amz-Signature=***&x=1"),
        ('{"token": "abc", "n": 3}', '{"token": "***", "n": 3}'),
        ("Authorization: Bearer abc", "Authorization: Bearer ***"),
        ("--header=hf_abcdefghijklmnopqrstuv", "--header=***"),
        ("sk-proj-abcdefghijklmnop", "***"),
        ("ghp_abcdefghijklmnopqrstuvwxyz0123456789", "***"),
        ("0123456789abcdef" * 2, "***"),
        ("x=Ab1" + "Cd2Ef3Gh4" * 4, "x=***"),
    ],
)
def test_secrets_are_masked(word, shown):
    """Catches a key on the command line that ends in environment.json and in every checkpoint."""
    assert provenance.command(["a", word, "b"]) == f"a {shown} b"


def test_the_word_after_a_flag_is_masked():
    """Catches `--token abc`, and a switch that hides the flag after it."""
    words = ["train", "--token", "abc", "--use_auth", "--steps", "4", "-key", "x", "y"]
    assert provenance.command(words) == "train --token *** --use_auth --steps 4 -key *** y"


@pytest.mark.parametrize(
    "word",
    [
        "--config.models.policy.init=hf:Skywork/Skywork-Reward-V2-Llama-3.1-8B-Instruct",
        "--config.data.max_tokens=64",
        "--config.data.tokenizer=byte",
        "--config.optim.decay_mask=.*/kernel",
        "--config.data.path=/data/bt_2024_hh_rlhf_lora_rank4_seed0_lr1e-4.jsonl",
        "--config.train.wandb=risk-averse-reward-models",
        "--monkey=3",
    ],
)
def test_what_is_no_secret_is_shown(word):
    """Catches a command that cannot be repeated, since half of it is stars."""
    assert provenance.command([word]) == word


def test_the_environment_is_json_and_says_what_ran(monkeypatch):
    """Catches a version that is missing, a value JSON cannot hold, a secret in the command."""
    monkeypatch.setattr(sys, "argv", ["jaxreward", "train", "--token", "abc"])
    made = provenance.environment()
    assert json.loads(json.dumps(made)) == made
    assert made["jax"] == jax.__version__ and made["processes"] == 1
    assert made["command"] == "jaxreward train --token ***"
    for name in ("jaxreward", "python", "platform", "devices", "flax", "optax", "numpy"):
        assert isinstance(made[name], str) and made[name]


def test_the_commit_and_whether_the_sources_differ(tmp_path, monkeypatch):
    """Catches a dirty checkout that passes for its commit, and an installed package that takes the
    commit of the folder it lies in."""
    (tmp_path / "jaxreward" / "core").mkdir(parents=True)
    source = tmp_path / "jaxreward" / "core" / "x.py"
    source.write_text("x = 1")
    monkeypatch.setattr(provenance, "__file__", str(source))
    assert provenance._checkout() == (None, None)  # nothing says that this is ours
    (tmp_path / "pyproject.toml").write_text("")
    assert provenance._checkout() == (None, None)  # no repository
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-q", "-m", "a"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    commit, dirty = provenance._checkout()
    assert len(commit) == 40 and dirty is False
    (tmp_path / "notes.txt").write_text("beside the sources")
    assert provenance._checkout() == (commit, False)
    source.write_text("x = 2")
    assert provenance._checkout() == (commit, True)
