"""What the papers in miniature share: small models, runs that are made once, lines of results."""

import datetime
import json
import os
import platform
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxreward import presets
from jaxreward.data import sources
from jaxreward.hub import export
from jaxreward.recipes import evaluate, online_rl, sft

HERE = Path(__file__).resolve().parent
SIZES = dict(width=64, depth=3, heads=4, kv_heads=4, head_dim=16, mlp=192, max_len=512)


def load(name, overrides, **sections):
    """A config with overrides, and with whole sections put in place."""
    config = presets.load(name, overrides)
    config.unlock()
    for section, value in sections.items():
        config[section] = value
    return config.lock()


def write(path, rows):
    """Rows as JSON lines; a file that is there is left as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        sources.write_jsonl(path, rows)
    return path


def new(folder, *, seed, denoiser=False):
    """A random model whose tokenizer has no chat template, so that texts are taken as they are."""
    # A denoiser with a tied head does not get away from the frequencies of tokens at this size.
    export.write_tiny(folder, seed=seed, denoiser=denoiser, tied=not denoiser, **SIZES)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("chat_template", None)
    path.write_text(json.dumps(settings))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return folder


def fine_tuned(folder, rows, *, seed, steps, start=None, lr=2e-3, max_len=256, batch=32):
    """The model that imitates `rows`, from a new small one or from `start`, as a folder."""
    out = folder / "model"
    if out.is_dir():
        return out
    start = start or new(folder / "new", seed=seed)
    config = load(
        "sft/chat",
        [
            f"seed={seed}",
            f"models.policy.init=hf:{start}",
            f"data.path={write(folder / 'rows.jsonl', rows)}",
            "data.template=plain",
            f"data.max_len={max_len}",
            f"data.row_len={max_len}",
            f"data.batch={batch}",
            "data.eval_fraction=0.02",
            f"optim.lr={lr}",
            f"train.steps={steps}",
            "train.log_every=100",
            "train.eval_every=0",
            "train.save_every=500",
        ],
    )
    sft.run(config, folder / "run")
    return evaluate.export(folder / "run", out)


def before(config, folder):
    """What the evaluators say of the initial model."""
    built = online_rl.build(config, folder)
    found = built.evaluate(built.state)
    built.batches.close()
    return found


def after(workdir):
    """What they said at the end of a run, and its rounds: (metrics, [metrics of a round])."""
    found, rounds = {}, []
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        found |= {k.removeprefix("eval/"): v for k, v in row.items() if k.startswith("eval/")}
        if "train/rollouts/reward" in row:
            rounds.append(row)
    return found, rounds


def evaluations(workdir, name):
    """[(step, value, low, high)] of every evaluation of a run, where `name` has an interval."""
    found = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        ends = [row.get(f"eval/{name}{end}") for end in ("", "_low", "_high")]
        if ends[0] is not None:
            found[row["step"]] = (row["step"], *ends)
    return [found[step] for step in sorted(found)]


class Results:
    """One line a run in a file; what is there is not run again."""

    def __init__(self, path):
        self.path = Path(path)
        text = self.path.read_text() if self.path.exists() else ""
        self.rows = [json.loads(line) for line in text.splitlines()]

    def has(self, **key):
        """Whether there is a line with these values."""
        return any(all(row.get(k) == v for k, v in key.items()) for row in self.rows)

    def add(self, **row):
        """Appends a line, with the date and the machine."""
        row |= {"date": datetime.date.today().isoformat(), "machine": platform.machine()}
        row |= {"cores": os.cpu_count()}
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
