"""MRMBench of a model: its states once, then probes, their controls, and distances. The model is
not trained.

    texts -> tokens -> states at the last token (sharded, kept on disk)
      -> probes of all tasks, seeds and settings in one program
      -> centroids -> distances -> what a threshold drops
"""

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxreward.core import provenance
from jaxreward.data import pairs as pair_data
from jaxreward.data import sources, tokenize
from jaxreward.data.corpora import mrmbench
from jaxreward.evals import distances, pairwise, pointwise, probes, probing
from jaxreward.hub import load
from jaxreward.models import heads, trainable
from jaxreward.parallel import hosts, rules
from jaxreward.recipes import evaluate
from jaxreward.train import checkpoint

_EXAMPLES = 3
_HELD_OUT = 0.2  # of the training prompts


def load_states_model(model: str | Path, *, batch: int = 8) -> evaluate.Model:
    """A reward model as `evaluate.load_model` gives it, or a language model whose states are read.

    Of a language model `plan.head` is None, and it predicts nothing. Of a run of one, give the
    exported folder.

    Args:
      model: A workdir or a Hugging Face folder. batch: Rows that run at a time.

    Raises:
      FileNotFoundError, ValueError: as `evaluate.load_model`; or if it is a denoiser.
    """
    model = Path(model)
    if (
        checkpoint.is_workdir(model)
        or "score.weight" in load.weight_files(model)
        or (model / load.HEAD_FILE).is_file()
    ):
        return evaluate.load_model(model, batch=batch)
    cfg, weights, _ = load.load(model, rules=rules.on_mesh())
    if cfg.mask != "causal":
        raise ValueError(
            f"{model} is a denoiser (mask={cfg.mask!r}); probes read the last token of an answer, "
            "which stands for all of it in a causal model only"
        )
    tokenizer = tokenize.load_tokenizer(model)
    template = tokenize.chosen_template(tokenizer, evaluate.recorded_template(model))
    protocol = {"model": str(model), "template": template, "max_len": None, "compute": cfg.compute}
    return evaluate.Model(
        plan=trainable.Plan(cfg, "all", head=None),
        params={"model": weights},
        frozen={},
        tokenizer=tokenizer,
        folder=model,
        template=template,
        max_len=None,
        protocol={**protocol, "truncation": "none"},
        predict=None,
        outputs=None,
    )


def model_hash(model: str | Path) -> str:
    """sha256 of a folder's config and weights, or of a workdir's config and checkpoints, without
    the optimizer's part; a workdir's frozen weights are hashed in its checkpoints."""
    model = Path(model)
    if not checkpoint.is_workdir(model):
        return load.content_hash(model)
    digest = hashlib.sha256()
    files = [path for path in (model / "checkpoints").rglob("*") if path.is_file()]
    for path in [model / "config.json", *sorted(files)]:
        name = path.relative_to(model).as_posix()
        if "/opt/" not in name:
            digest.update(f"{name}\n".encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def run(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    level: str = "easy",
    mode: str = "strong",
    form: str = "paper",
    tasks: Sequence[str] = (),
    seeds: int = 5,
    lrs: Sequence[float] = probes.LRS,
    limit: int | None = None,
    max_len: int = 2048,
    whole: bool = False,
    distance: str = "euclidean",
    clusters: int = 1,
    quantile: float = 0.9,
    pairs: str | Path | None = None,
    name: str = "",
    batch: int = 8,
) -> dict:
    """Probes a model on MRMBench and writes what was measured.

    The states lie in a folder `states` beside `out` and are read back when the same texts and
    weights come again, as those of the other level or mode do.

    Args:
      model: A workdir, the folder of a reward model, or of a language model.
      data: Folder as `mrmbench.load` takes it.
      out: The result, JSON.
      level: "easy" or "hard". mode: "paper" or "strong", see `probing.probe`.
      form: Of the texts, "paper" or "template", see `mrmbench.encode`.
      tasks: Of the benchmark; () takes those that are there.
      seeds: Fits of each probe. lrs: Learning rates of the paper's mode; the first is reported.
      limit: Answers of each split at most; None takes all.
      max_len: Texts of more tokens are left out.
      whole: The test files are the real ones, whole; see `mrmbench.check_split`.
      distance, clusters: Metric and centroids a label, see `distances.fit`.
      quantile: Of the distances of held-out training answers that the threshold is set to.
      pairs: File of preference pairs: whether the distance tells where the reward model errs.
      name: Of the result; default "mrmbench-LEVEL-MODE".
      batch: Rows that run at a time.

    Returns:
      {"name", "protocol", "environment", "metrics", "examples"} as written. Metrics are those of
      `probing.probe`; under "distances" the threshold, the share of the test answers beyond it,
      and for each task how often the nearest centroid has the answer's label; under "pairs" the
      AUROC of the distance (the larger of the two answers') for the reward's errors, and its
      accuracy on pairs within the threshold and beyond.

    Raises:
      ValueError, FileNotFoundError: saying what does not fit.

    References: MRMBench, arXiv:2511.12464; `docs/papers/mrmbench.md` says what is inferred.
    """
    if mode not in probing.MODES or form not in mrmbench.FORMS or seeds < 1:
        raise ValueError(
            f"expected mode in {probing.MODES}, form in {mrmbench.FORMS} and seeds >= 1; received "
            f"{mode!r}, {form!r} and {seeds}"
        )
    if distance not in distances.METRICS:
        raise ValueError(f"distance must be one of {distances.METRICS}; received {distance!r}")
    if not 0 <= quantile <= 1 or clusters < 1:
        raise ValueError(
            f"expected a quantile in [0, 1] and clusters >= 1; received {quantile} and {clusters}"
        )
    found, files = mrmbench.load(data, level, tasks=tuple(tasks), whole=whole)
    found = {
        task: {split: mrmbench.sample(items, limit) for split, items in splits.items()}
        for task, splits in found.items()
    }
    loaded = load_states_model(model, batch=batch)
    if pairs and loaded.plan.head is None:
        raise ValueError(f"{model} gives no rewards that could err; leave pairs out")
    items = [item for splits in found.values() for some in splits.values() for item in some]
    trees, index = mrmbench.encode(
        loaded.tokenizer, items, form=form, template=loaded.template, max_len=max_len
    )
    if pairs:  # before anything is computed: a file that does not fit loses nothing
        records, _ = sources.read_pairs(pairs)
        template = "plain" if form == "paper" else loaded.template
        compared, _ = pair_data.encode_pairs(loaded.tokenizer, records, template=template)
    weights, folder = model_hash(model), Path(out).parent / "states"

    extract = probing.make_extract(loaded.plan, rules=rules.on_mesh(), batch=batch)
    named = f"{weights} {loaded.plan.cfg.compute}"

    def states_of(trees):
        compute = lambda: extract(loaded.params, loaded.frozen, trees)
        width = loaded.plan.cfg.width
        return probing.cached(folder, trees, compute, model=named, width=width)

    began = time.monotonic()
    states = states_of(trees)
    extracted = time.monotonic()
    made, left_out, shared = _tasks(found, items, index)
    classes = len(mrmbench.LABELS[level][next(iter(found))])
    metrics = probing.probe(
        states, made, classes=classes, mode=mode, seeds=seeds, lrs=lrs, held_out=_HELD_OUT
    )
    probed = time.monotonic()
    centroids, tau, metrics["distances"] = _distances(
        states, made, classes, metric=distance, k=clusters, quantile=quantile
    )
    if pairs:
        metrics["pairs"] = _errors(loaded, compared, states_of(compared), centroids, tau)
    result = {
        "name": name or f"mrmbench-{level}-{mode}",
        "protocol": {
            **loaded.protocol,
            "model_sha256": weights,
            "level": level,
            "mode": mode,
            "form": form,
            "seeds": seeds,
            "max_len": max_len,
            "data": {path.as_posix(): sources.data_hash(path) for path in files},
            "whole": whole,
            "limit": limit,
            "too long, left out": left_out,
            "test prompts that training has too": shared,
            "distance": {"metric": distance, "clusters": clusters, "quantile": quantile},
            **({"pairs": str(pairs), "pairs_sha256": sources.data_hash(pairs)} if pairs else {}),
            "intervals": "95 %, test prompts resampled 2000 times",
            "seconds": {"states": extracted - began, "probes": probed - extracted},
        },
        "environment": provenance.environment(),
        "metrics": metrics,
        "examples": _examples(found, items, index, states, centroids, tau, level),
    }
    if hosts.is_writer():
        evaluate.write_json(out, result)
    return result


def _tasks(found, items, index):
    """({task: Task}, {task: {split: left out}}, {task: prompts on both sides})."""
    prompts, at = {}, 0
    numbers = np.array([prompts.setdefault(item["input"], len(prompts)) for item in items])
    made, left_out, shared = {}, {}, {}
    for task, splits in found.items():
        parts, left_out[task] = {}, {}
        for split, some in splits.items():
            here = slice(at, at + len(some))
            fits = index[here] >= 0
            labels = np.array([item["label"] for item in some])
            parts[split] = index[here][fits], labels[fits], numbers[here][fits]
            left_out[task][split] = int((~fits).sum())
            if not fits.any():
                raise ValueError(f"{task}: every text of the {split} split is longer than max_len")
            at += len(some)
        made[task] = probing.Task(*parts["train"], *parts["test"])
        shared[task] = len(np.intersect1d(parts["train"][2], parts["test"][2]))
    return made, left_out, shared


def _distances(states, tasks, classes, *, metric, k, quantile):
    """(centroids, threshold, metrics): centroids of training answers, the threshold of others."""
    labels, held = {}, np.zeros(len(states), bool)
    for name, task in tasks.items():
        out = probing.validation(task.train_groups, _HELD_OUT, 0)
        held[task.train[out]] = True
        labels[name] = np.full(len(states), -1)
        labels[name][task.train[~out]] = task.train_labels[~out]
    for given in labels.values():
        given[held] = -1  # also where two prompts with one text fell on different sides
    centroids = distances.fit(states, labels, k=k, metric=metric)
    tau = distances.threshold(distances.d_min(centroids, states[held]), quantile)
    rows = np.unique(np.concatenate([task.test for task in tasks.values()]))
    found: dict = {
        "threshold": tau,
        "dropped": float(distances.dropped(distances.d_min(centroids, states[rows]), tau).mean()),
    }
    for d, (name, task) in enumerate(tasks.items()):
        nearest = distances.nearest_label(
            centroids, distances.distances(centroids, states[task.test])
        )
        measured = probing.measures(np.eye(classes)[nearest[:, d]], task.test_labels)
        found[name] = {key: measured[key] for key in ("accuracy", "balanced_accuracy")}
    return centroids, tau, found


def _errors(loaded, trees, states, centroids, tau):
    """Whether distance tells the pairs that the reward model orders wrongly."""
    values = heads.outputs(loaded.params["score"], jnp.asarray(states)[:, None])
    rewards = np.asarray(heads.reward(loaded.plan.head, values))[:, 0]
    far = distances.d_min(centroids, states)
    ends = np.cumsum([len(tree.answers) for tree in trees])[:-1]
    found = pairwise.outcomes(trees, np.split(rewards, ends))
    larger = np.array(
        [
            max(some[a], some[b])
            for tree, some in zip(trees, np.split(far, ends))
            for a, b in tree.pairs
        ]
    )
    metrics = {"accuracy": float(found["right"].mean()), "pairs": float(len(larger))}
    wrong = found["right"] < 0.5
    if wrong.any() and not wrong.all():
        metrics["auroc"] = pointwise.auroc(larger, wrong)
    beyond = distances.dropped(larger, tau)
    metrics["dropped"] = float(beyond.mean())
    for part, rows in (("accuracy_kept", ~beyond), ("accuracy_dropped", beyond)):
        if rows.any():
            metrics[part] = float(found["right"][rows].mean())
    return metrics


def _examples(found, items, index, states, centroids, tau, level):
    """What the first test answers are near to."""
    first = next(iter(found.values()))["test"]
    start = next(i for i, item in enumerate(items) if item is first[0])
    some = [i for i in range(start, start + len(first)) if index[i] >= 0][:_EXAMPLES]
    told = distances.explain(centroids, states[index[some]], mrmbench.LABELS[level])
    out = []
    for i, near in zip(some, told):
        least = min(far for _, far in near.values())
        near = {task: {"label": label, "distance": far} for task, (label, far) in near.items()}
        out.append({"id": items[i]["id"], "d_min": least, "dropped": least > tau, "near": near})
    return out
