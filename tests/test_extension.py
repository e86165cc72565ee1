"""The playbooks of docs/ are run as they stand: files written, commands executed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxreward import cli
from jaxreward.core.resolve import resolve
from jaxreward.models import decoder, families
from jaxreward.recipes import preference

REPO = Path(__file__).resolve().parents[1]


def blocks(page):
    """(name of the file or None, words after the fence, text) of every code block of a page."""
    text = (REPO / "docs" / page).read_text(encoding="utf-8")
    found = re.findall(r"(?:^`([\w./]+)`:\n\n)?^```(\w[^\n]*)\n(.*?)^```$", text, re.M | re.S)
    return [(name or None, words, body) for name, words, body in found]


def environment(folder):
    """Of a user's shell in `folder`, with this Python and one device."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {
        **os.environ,
        "PATH": path,
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        **{k: str(folder / k) for k in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR")},
    }


def shell(command, folder):
    """What a command prints, run as in bash; fails with all it said if it fails."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """A folder with the files of docs/add_a_paper.md, after its commands."""
    folder = tmp_path_factory.mktemp("paper")
    for name, words, body in blocks("add_a_paper.md"):
        if name is not None:
            assert words == "python"
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(body)
    (commands,) = (body for _, words, body in blocks("add_a_paper.md") if words == "bash")
    # This checkout comes before what else is installed, and the page's `.` before both.
    commands = commands.replace("PYTHONPATH=.", f"PYTHONPATH=.:{REPO}")
    shell(commands, folder)
    return folder


@pytest.mark.slow
def test_a_loss_and_an_evaluator_from_outside_the_package_train(paper):
    """Catches names of a user's package that are not found, and words that do not reach the loss:
    with gamma 1 and rewards close to 0, half of log 2 a pair."""
    config = json.loads((paper / "runs/focal/config.json").read_text())
    assert config["losses"]["focal"] == {
        "fn": "mypkg.losses:focal",
        "coef": 1.0,
        "gamma": 1.0,
        "margin": "none",
    }
    got = lines(paper / "runs/focal")
    first = next(line for line in got if "train/loss/focal" in line)
    assert first["train/loss/focal"] == pytest.approx(0.5 * np.log(2), rel=0.3)
    total = first["train/loss/focal"] + first["train/loss/centring"]
    assert first["train/loss"] == pytest.approx(total, rel=1e-5)
    last = [line for line in got if "eval/gaps/median" in line][-1]
    assert np.isfinite(last["eval/gaps/median"]) and 0 <= last["eval/gaps/wide"] <= 1
    assert "eval/heldout/accuracy" in last


def test_a_loss_of_main_is_taken_for_one_of_pairs(monkeypatch):
    """Catches a `__main__` that is looked for in the package, and a user's keyword that is lost."""
    here = {}
    exec("def my_loss(chosen, rejected, *, width=1.0): return width - (chosen - rejected)", here)
    monkeypatch.setattr(sys.modules["__main__"], "my_loss", here["my_loss"], raising=False)
    entry = {"fn": "__main__:my_loss", "coef": 0.5, "width": 3.0, "margin": "none"}
    _, _, coef = preference.make_loss(None, {"mine": entry})
    assert coef == {"mine": 0.5}
    with pytest.raises(ValueError, match="does not take height; it accepts: chosen, rejected"):
        preference.make_loss(None, {"mine": {**entry, "height": 1.0}})


@pytest.mark.slow
def test_a_loss_of_a_notebook_trains(tmp_path, require):
    """The notebook of docs/add_a_paper.md in a real kernel, whose functions no file holds."""
    require("nbclient")
    require("ipykernel")
    import nbclient
    import nbformat

    (cell,) = (body for _, words, body in blocks("add_a_paper.md") if words == "python notebook")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    kernels = tmp_path / "jupyter" / "kernels" / "this_python"
    kernels.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernels / "kernel.json").write_text(
        json.dumps({"argv": argv, "display_name": "this python", "language": "python"})
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(tmp_path).items():
            patch.setenv(name, value)
        patch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
        patch.setenv("PYTHONPATH", str(REPO))
        nbclient.NotebookClient(
            notebook,
            timeout=300,
            kernel_name="this_python",
            resources={"metadata": {"path": str(tmp_path)}},
        ).execute()
    config = json.loads((tmp_path / "runs/notebook/config.json").read_text())
    assert config["losses"]["bt"]["fn"] == "__main__:my_loss"
    # A hinge of width 1, of rewards that are close to each other; Bradley-Terry would say 0.7.
    assert lines(tmp_path / "runs/notebook")[0]["train/loss"] == pytest.approx(1.0, abs=0.2)


def test_a_function_of_main_that_another_process_asks_for_is_refused(tmp_path, capsys):
    """Catches a run that starts with another function than the notebook's, or fails without a
    word on where it looked."""
    code = cli.main(
        [
            "train",
            "--config=reward_model/bradley_terry:smoke",
            f"--workdir={tmp_path / 'run'}",
            "--config.losses.bt.fn=__main__:loss_that_a_notebook_had",
        ]
    )
    shown = capsys.readouterr().err
    assert code == 1 and "no public function 'loss_that_a_notebook_had' in __main__" in shown


def test_a_recipe_from_outside_the_package_is_found(paper, monkeypatch):
    """Catches a loop that must lie in the package."""
    (paper / "mypkg" / "recipe.py").write_text("def run(config, workdir):\n    return workdir\n")
    monkeypatch.syspath_prepend(paper)
    assert resolve("recipes", "mypkg.recipe.run")(None, "there") == "there"


def python_of(page):
    return [body for name, words, body in blocks(page) if words == "python"]


def test_the_family_of_the_page_is_an_entry(monkeypatch):
    """The blocks of docs/add_a_model.md that need no torch: config.json in, out, and the names."""
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    made, shown, _ = python_of("add_a_model.md")
    exec(made + shown, {})
    assert "ministral" in families.FAMILIES
    page = (REPO / "docs" / "add_a_model.md").read_text(encoding="utf-8")
    quoted = re.search(r'^    "qwen3": (Family\(.*\))$', page, re.M)[1]
    assert eval(quoted, {"Family": families.Family}) == families.FAMILIES["qwen3"]


@pytest.mark.slow
def test_the_family_of_the_page_is_the_same_model(tmp_path, require):
    """All blocks of docs/add_a_model.md, in a process of their own: a family that the package lacks
    is added, and `jaxreward verify` finds it equal to transformers."""
    require("torch")
    (tmp_path / "page.py").write_text("\n".join(python_of("add_a_model.md")))
    shown = shell(f"PYTHONPATH={REPO} {sys.executable} page.py", tmp_path)
    assert shown.rstrip().endswith("the same model")


def test_every_switch_of_the_decoder_is_explained():
    """Catches a field of `decoder.Config` or of `families.Family` that a page leaves out."""
    page = (REPO / "docs" / "add_a_model.md").read_text(encoding="utf-8")
    named = {word for code in re.findall("`([^`\n]+)`", page) for word in re.findall(r"\w+", code)}
    sizes = {"vocab", "width", "depth", "heads", "kv_heads", "head_dim", "mlp"}
    fields = {*decoder.Config.__dataclass_fields__, *families.Family.__dataclass_fields__}
    assert fields - sizes - named == set()
    assert {*families.FAMILIES} - named == set()
