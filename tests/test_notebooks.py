"""Every notebook runs from top to bottom in a fresh kernel, and shows what its text promises."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """Name of a kernel that is this very Python, on one CPU device, with the checkout in reach."""
    spec = tmp_path / "jupyter" / "kernels" / "this_python"
    spec.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(
        json.dumps({"argv": argv, "display_name": "this python", "language": "python"})
    )
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "TMPDIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    path = os.environ.get("PYTHONPATH")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(FOLDER.parent), *([path] if path else [])])
    )
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    monkeypatch.delenv("MPLBACKEND", raising=False)
    return "this_python"


def shown(cell):
    """All text that a cell put out."""
    return "".join(
        out.get("text", "") + out.get("data", {}).get("text/plain", "") for out in cell.outputs
    )


def test_there_are_notebooks():
    """Catches a moved folder, which would leave the tests below with nothing to run."""
    assert "quickstart.ipynb" in [path.name for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_clean(path):
    """Outputs and counts of an author's machine are not committed; the first cell installs."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    first = "".join(code[0]["source"])
    assert re.search(r"try:\s+import jaxreward\s+except ImportError:\s.*%pip install", first, re.S)


# All run in the slow tier: a minute and more where the cores are shared.
RUN = [pytest.param(p, id=p.stem, marks=pytest.mark.slow) for p in NOTEBOOKS]


@pytest.mark.parametrize("path", RUN)
def test_runs(path, kernel, tmp_path, require):
    """Catches a notebook that fell behind the library; nothing is left beside it."""
    require("nbclient")
    require("ipykernel")
    import nbclient
    import nbformat

    before = sorted(FOLDER.iterdir())
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name=kernel, resources={"metadata": {"path": str(FOLDER)}}
    ).execute()
    assert sorted(FOLDER.iterdir()) == before
    # The notebook cleans up after itself; the kernel may keep a folder of its own.
    assert not [p for p in (tmp_path / "TMPDIR").rglob("*") if p.is_file()]
    images = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    assert any("image/png" in out.get("data", {}) for out in images)
    checks = {"quickstart": quickstart, "grpo_judge": grpo_judge, "diffusion_rl": diffusion_rl}
    checks.get(path.stem, lambda notebook: None)(notebook)


def quickstart(notebook):
    """Its numbers: it learned, the polite answer wins, and transformers agrees."""
    by = {word: shown(cell) for cell in notebook.cells if cell.cell_type == "code"
          for word in ("preference.build", "preference.run", "evaluate.score", "AutoTokenizer")
          if word in cell.source}  # fmt: skip
    assert float(re.search(r"loss ([\d.e-]+) after step 1", by["preference.build"])[1]) < 3
    curve = [float(x) for x in re.findall(r"train \d+/30  loss ([\d.e-]+)", by["preference.run"])]
    assert len(curve) == 15 and curve[-1] < 0.5 * curve[0]
    polite, rude = (float(x) for x in re.findall(r"^([+-][\d.]+)  ", by["evaluate.score"], re.M))
    assert polite > rude + 0.5
    differences = re.findall(r"difference (\S+)", by["AutoTokenizer"])
    if "torch is not installed" not in by["AutoTokenizer"]:
        assert len(differences) == 2 and all(float(x) < 1e-4 for x in differences)


def grpo_judge(notebook):
    """Its numbers: rationales taught the form, rewards made it right more often, in both orders."""
    said = "".join(shown(cell) for cell in notebook.cells if cell.cell_type == "code")
    found = re.findall(r"^(\w+) +before ([\d.]+)  after ([\d.]+)$", said, re.M)
    before, after = ({name: float(x[k]) for name, *x in found} for k in (0, 1))
    assert before["unparseable"] < 0.6 and after["unparseable"] < before["unparseable"] + 0.02
    assert after["single_accuracy"] > before["single_accuracy"] + 0.05
    assert after["pair_accuracy"] <= after["consistency"]
    assert "<answer>" in said and "judge/accuracy" in said


def diffusion_rl(notebook):
    """Its numbers: more steps are better, a search repairs few of them, rewards make few enough."""
    said = "\n".join(shown(cell) for cell in notebook.cells if cell.cell_type == "code")
    read = lambda line: {int(n): [*map(float, x)] for n, *x in re.findall(line, said, re.M)}
    searched = read(r"^(\d) steps  right ([\d.]+)  best of 8 in each ([\d.]+)$")
    taught = read(r"^(\d) steps  before ([\d.]+)  after ([\d.]+)  different right answers")
    before = {steps: x[0] for steps, x in taught.items()}
    # Three pairs drawn blindly are right once in eight times.
    assert before[1] < 0.3 and before[2] < before[8] - 0.2 and before[8] > 0.8
    assert searched.keys() == {1, 2} and all(b > a + 0.2 for a, b in searched.values())
    assert all(taught[steps][1] > before[steps] + 0.3 for steps in (1, 2))
    pictures = [out for cell in notebook.cells for out in cell.get("outputs", ()) if "data" in out]
    assert sum("image/png" in out["data"] for out in pictures) == 2
