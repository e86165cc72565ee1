"""The wheel as strangers get it: what is in it, and that it works away from the checkout."""

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import jaxreward

REPO = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


def run(*argv, **kw):
    """Runs a command, and fails with what it said."""
    done = subprocess.run([str(x) for x in argv], capture_output=True, text=True, timeout=300, **kw)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built as pip builds it: in an environment of its own, with the
    pinned hatchling."""
    folder = tmp_path_factory.mktemp("wheel")
    run(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, REPO),
        env={**os.environ, "PIP_CONSTRAINT": str(REPO / "constraints.txt")},
    )
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """(Python, environment, folder) with nothing of jaxreward but the wheel.

    The new environment reads the packages of this one from a .pth, which lies behind its own; the
    .pth files in there, an editable install among them, are not followed.
    """
    folder = tmp_path_factory.mktemp("stranger")
    venv.create(folder / "venv", symlinks=True, with_pip=False)
    python = folder / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    here = {sysconfig.get_path(key) for key in ("purelib", "platlib")}
    (site / "packages.pth").write_text("\n".join(sorted(here)) + "\n")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"),
        *("--ignore-installed", "--no-compile", wheel),
        env=env,
    )
    work = folder / "elsewhere"
    work.mkdir()
    flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}
    return python, {**env, **flags}, work


def test_it_holds_the_package_its_configs_and_its_licence_and_nothing_else(wheel):
    """Catches tests or docs in the wheel, and configs, templates or the typing mark left out."""
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if not name.endswith("/")}
        licence = next(name for name in held if name.endswith("licenses/LICENSE"))
        assert archive.read(licence) == (REPO / "LICENSE").read_bytes()
        metadata = archive.read(f"jaxreward-{jaxreward.__version__}.dist-info/METADATA").decode()
    files = [path for top in ("jaxreward", "configs") for path in (REPO / top).rglob("*")]
    names = {
        str(path.relative_to(REPO))
        for path in files
        if path.is_file() and "__pycache__" not in path.parts
    }
    ours = {name for name in held if name.startswith("jaxreward/")}
    assert ours == {re.sub("^configs/", "jaxreward/_configs/", name) for name in names}
    assert {"jaxreward/py.typed", "jaxreward/report/page.html.jinja"} <= ours
    others = {name.split("/")[0] for name in held - ours}
    assert others == {f"jaxreward-{jaxreward.__version__}.dist-info"}
    assert f"Version: {jaxreward.__version__}\n" in metadata
    assert "License-Expression: Apache-2.0" in metadata


def test_it_trains_and_exports_away_from_the_checkout(installed):
    """Catches what works only in a checkout: configs that are not found, data files that are read
    beside the sources, and the editable install in place of the wheel."""
    python, env, work = installed
    jaxreward_ = python.with_name("jaxreward")
    where = run(python, "-c", "import jaxreward; print(jaxreward.__file__)", cwd=work, env=env)
    assert Path(where.strip()).is_relative_to(python.parents[1])
    assert run(jaxreward_, "--version", cwd=work, env=env).strip().endswith(jaxreward.__version__)
    run(
        *(jaxreward_, "train", "--config", "reward_model/bradley_terry:smoke"),
        *("--workdir", "runs/toy"),
        cwd=work,
        env=env,
    )
    run(jaxreward_, "export", "--model", "runs/toy", "--out", "model", cwd=work, env=env)
    assert (work / "model" / "model.safetensors").is_file()
