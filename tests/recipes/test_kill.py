"""A run that is killed at every kind of moment ends with the bits of one that is not."""

import json
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxreward
from jaxreward.core import trees

STEPS, SAVE, EVAL = 40, 4, 5
# (kind, at), in the order of the kills; see kill_driver.py. They spread over the whole run.
KILLS = (
    ("features", 0),
    ("cache", 0),
    ("line", 2),
    ("checkpoint", 4),
    ("evaluation", 1),
    ("step", 9),
    ("item", 12),
    ("evaluation", 1),
    ("line", 18),
    ("checkpoint", 20),
    ("deletion", 16),
    ("step", 27),
    ("item", 32),
    ("line", 35),
    ("evaluation", 2),
    ("checkpoint", 40),
)


def start(workdir, cache, kind="none", at=0):
    """One process of the run; `cache` is the home of its compilation cache."""
    marker = workdir.parent / "marker"
    marker.unlink(missing_ok=True)
    words = f"train --config reward_model/bradley_terry:smoke --config.train.steps={STEPS}"
    words += f" --config.train.save_every={SAVE} --config.train.eval_every={EVAL}"
    words += f" --config.mesh.data=1 --workdir {workdir}"
    driver = Path(__file__).with_name("kill_driver.py")
    env = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS="", XDG_CACHE_HOME=str(cache))
    env |= {"JAXREWARD_COMPILE_CACHE": "1"}
    # A script has its own folder on the path, not the one that pytest runs in.
    paths = [str(Path(jaxreward.__file__).parents[1]), env.get("PYTHONPATH")]
    env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAXREWARD_DISTRIBUTED"):
        env.pop(name, None)
    return subprocess.run(
        [sys.executable, driver, kind, str(at), marker, *words.split()],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def names(folder):
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def lines(workdir):
    """The whole lines, and what stands after them."""
    path = workdir / "metrics.jsonl"
    *whole, rest = (path.read_text() if path.is_file() else "").split("\n")
    return [json.loads(line) for line in whole], rest


def values(workdir):
    """[(step, {name: value})], without what depends on the clock."""
    whole, rest = lines(workdir)
    assert rest == ""
    return [
        {k: v for k, v in line.items() if "second" not in k and k != "train/mfu"} for line in whole
    ]


def check_evidence(kind, at, note, workdir, cache):
    """Asserts from what is on the disk that the process was cut where it should be."""
    held = names(workdir / "checkpoints")
    logged, rest = lines(workdir)
    if kind in ("checkpoint", "item"):
        partial = [name for name in held if name.startswith(f"{at}.orbax-checkpoint-tmp")]
        assert len(partial) == 1 and str(at) not in held, held
        inside = names(workdir / "checkpoints" / partial[0])
        # Before its last step all items are there; earlier some have no final name yet.
        unnamed = [name for name in inside if "orbax-checkpoint-tmp" in name]
        assert bool(unnamed) == (kind == "item"), inside
    elif kind == "deletion":
        victim = note.split()[1]
        inside = names(workdir / "checkpoints" / victim)
        assert "params" in inside and "opt" not in inside
        assert len([name for name in held if name.isdigit()]) == 3
    elif kind == "cache":
        (entry,) = cache.rglob(note)
        assert note.startswith("jit_step")
        with pytest.raises(zlib.error):
            zlib.decompress(entry.read_bytes())
    elif kind == "features":
        assert [name for name in names(workdir / "features") if name.endswith(".partial")]
    elif kind == "line":
        assert rest == f'{{"step": {at}, "train/lo'
    elif kind == "evaluation":
        # Its step is logged, its result is not.
        assert logged[-1]["step"] % EVAL == 0 and "train/loss" in logged[-1]
    elif kind == "step":
        assert note == f"step {logged[-1]['step']}"


def arrays(workdir):
    """The last checkpoint as raw arrays by path, read without any of our own code."""
    import orbax.checkpoint as ocp

    out = {}
    for item in ("params", "opt"):
        folder = workdir / "checkpoints" / str(STEPS) / item
        with ocp.StandardCheckpointer() as reader:
            tree = reader.metadata(folder).item_metadata.tree
            where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            like = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree
            )
            got = reader.restore(folder, like)
        out |= {f"{item}/{path}": np.asarray(x) for path, x in trees.flatten(got).items()}
    return out


@pytest.mark.slow
def test_killed_at_every_kind_of_moment(tmp_path):
    """Catches whatever a kill breaks: half a checkpoint, line, cache entry or file that is taken
    for a whole one; data, moments, randomness or the schedule that start over; cached programs
    that compute other bits than fresh ones."""
    whole = tmp_path / "whole" / "run"
    out = start(whole, tmp_path / "cache_whole")
    assert out.returncode == 0, out.stderr

    cut, cache = tmp_path / "cut" / "run", tmp_path / "cache_cut"
    counts = {kind: 0 for kind, _ in KILLS}
    reached, cut_entry = [], None
    for kind, at in KILLS:
        before = names(cut / "checkpoints")
        out = start(cut, cache, kind, at)
        assert out.returncode == -signal.SIGKILL, (kind, at, out.stderr[-3000:])
        note = (cut.parent / "marker").read_text()
        check_evidence(kind, at, note, cut, cache)
        counts[kind] += 1
        # What the kill before left is cleared away, and named.
        for name in before:
            if "orbax-checkpoint-tmp" in name:
                assert f"removed what unfinished saves left: {name}" in out.stderr
        assert "is damaged" not in out.stderr
        if cut_entry:
            assert f"removed 1 damaged entries of the compilation cache: {cut_entry}" in out.stderr
        cut_entry = note if kind == "cache" else None
        reached.append(max([line["step"] for line in lines(cut)[0]], default=0))
    assert sum(counts.values()) >= 10 and counts["checkpoint"] + counts["item"] >= 3
    assert counts["cache"] >= 1 and counts["evaluation"] >= 1
    # Uniform: no stretch of a quarter of the run without a kill.
    assert reached[0] == 0 and reached[-1] == STEPS
    assert max(np.diff(sorted(reached))) < STEPS / 4, reached

    out = start(cut, cache)
    assert out.returncode == 0 and "Traceback" not in out.stderr, out.stderr
    assert names(cut / "checkpoints") == names(whole / "checkpoints") == {"36", "40"}
    got, want = arrays(cut), arrays(whole)
    assert set(got) == set(want) and any(path.startswith("opt/") for path in got)
    for path in want:
        assert got[path].dtype == want[path].dtype
        assert got[path].tobytes() == want[path].tobytes(), path
    assert values(cut) == values(whole)
    steps = [line["step"] for line in values(cut) if "train/loss" in line]
    assert steps == list(range(1, STEPS + 1))
    saved = [json.loads((x / "checkpoints/40/data/metadata").read_text()) for x in (cut, whole)]
    assert saved[0] == saved[1]
