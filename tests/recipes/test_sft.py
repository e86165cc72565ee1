"""Fine-tuning on completions at toy size: the loss is the formula, whatever the layout; it learns,
resumes bit for bit, and exports what transformers finds equally likely."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreward import cli, presets, testing
from jaxreward.core import metrics as m
from jaxreward.core import trees as tr
from jaxreward.core.types import Rows
from jaxreward.data import sources
from jaxreward.evals import likelihood, scorer
from jaxreward.hub import export, load
from jaxreward.models import decoder, trainable
from jaxreward.parallel import mesh
from jaxreward.parallel import specs as sp
from jaxreward.recipes import evaluate, sft
from jaxreward.train import checkpoint, session, step

LORA = ("models.policy.train=lora", "models.policy.lora_rank=4", "models.policy.top_layers=0")
TOP = ("models.policy.train=top", "models.policy.top_layers=1")
# By hand for 2 layers of width 32, 4 and 2 heads of 8, mlp 64, vocabulary 259; the head is tied.
EMBED, LAYER, NORM = 259 * 32, 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32, 32
ADAPTERS = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))


def config(folder, *overrides):
    """The smoke config, from a model that is already there."""
    fixed = [f"models.policy.init=hf:{folder}", "data.max_len=128"]
    return presets.load("sft/chat:smoke", [*fixed, *overrides])


@pytest.fixture(scope="session")
def untied_folder(tmp_path_factory):
    """A tiny language model with a head of its own."""
    folder = tmp_path_factory.mktemp("untied")
    cfg = testing.tiny_config(tied=False)
    tiny = export.write_tiny(folder / "tied")
    params = sp.init(decoder.specs(cfg), jax.random.key(3))
    return export.write(folder / "model", cfg, params, source=tiny)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """30 conversations in a file: of two turns, and prompts with completions."""
    rows = []
    for i, pair in enumerate(testing.synthetic_pairs(30, seed=2)):
        question, answer = pair["prompt"], pair["chosen"]
        if i % 3:
            rows.append({"id": i, "prompt": question, "completion": answer})
        else:
            said = [
                ("user", "hi"),
                ("assistant", "hello"),
                ("user", question),
                ("assistant", answer),
            ]
            rows.append({"messages": [{"role": r, "content": c} for r, c in said]})
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    sources.write_jsonl(path, rows)
    return path


@pytest.fixture(scope="module")
def finished(tiny_folder, chats, tmp_path_factory):
    """(config, workdir) of 4 steps on a file through the command line; not to be written into."""
    folder = tmp_path_factory.mktemp("finished_sft")
    shutil.copytree(tiny_folder, folder / "base")
    flags = {
        "models.policy.init": f"hf:{folder / 'base'}",
        "data.path": chats,
        "data.eval_fraction": 0.3,
        "data.max_len": 128,
        "data.batch": 4,
        "optim.lr": "3e-3",
    }
    flags = [f"--config.{k}={v}" for k, v in flags.items()]
    workdir = folder / "run"
    argv = ["train", "--config", "sft/chat:smoke", "--workdir", str(workdir), "--debug", *flags]
    assert cli.main(argv) == 0
    return presets.read(workdir / "config.json"), workdir


@functools.partial(jax.jit, static_argnums=0)
def from_all_logits(cfg, weights, tokens, live):
    """Log-probability of the token after each slot of one text, the plain way."""
    segments = live.astype(jnp.int32)
    rows = Rows(tokens, live, live, jnp.arange(128)[None, :, None], segments, 0 * segments)
    states = decoder.backbone(
        weights,
        cfg,
        decoder.embed(weights, cfg, rows),
        positions=rows.positions,
        segments=rows.segments,
        trunk=rows.trunk,
    ).states
    logps = jax.nn.log_softmax(states @ decoder.head_matrix(weights, cfg))
    return jnp.take_along_axis(logps[:, :-1], tokens[:, 1:, None], axis=2)[0, :, 0]


def alone(cfg, weights, tree):
    """Log-probabilities of a conversation's supervised tokens, by itself and from all logits."""
    tokens = np.concatenate([tree.prompt, *tree.answers])
    loss = np.concatenate([np.zeros(len(tree.prompt), bool), *tree.loss])
    padded = np.pad(tokens, (0, 128 - len(tokens)))[None]
    got = from_all_logits(cfg, weights, padded, np.arange(128)[None] < len(tokens))
    return np.asarray(got)[: len(tokens) - 1][loss[1:]]


def no_mesh(patch):
    """Everything on one device, until the patch is undone."""
    real = mesh.make_mesh
    patch.setattr(mesh, "make_mesh", lambda sizes=None: real(sizes, devices=jax.devices()[:1]))


@pytest.fixture
def one_device(monkeypatch):
    """Compiles faster; the mesh has a test of its own, and the run below has one."""
    no_mesh(monkeypatch)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def by_hand(built, steps):
    """(final parameters, metrics of every step), without the loop."""
    now, out = built.state, []
    for _ in range(steps):
        now, metrics = built.step(now, built.frozen, built.to_device(next(built.batches)))
        out.append(m.results(metrics))
    return now, out


def test_the_loss_is_the_mean_over_supervised_tokens(tiny_folder, chats, tmp_path, one_device):
    """Catches prompts that count, tokens predicted by themselves, a mean of rows or conversations,
    and packed conversations that see each other."""
    made = config(tiny_folder, f"data.path={chats}", f"data.eval_path={chats}", "data.batch=16")
    built = sft.build(made, tmp_path)
    assert built.facts["rows"]["count"] <= 16 < len(built.train) == 30  # one batch, packed
    cfg, weights, _ = load.load(tiny_folder)
    logps = [alone(cfg, weights, tree) for tree in built.train]
    want = -np.concatenate(logps).mean()
    assert abs(want + np.mean([x.mean() for x in logps])) > 1e-4  # another mean would show
    # Bytes of the answers and one end token each; "hello" and its end in every third.
    said = [pair["chosen"] for pair in testing.synthetic_pairs(30, seed=2)]
    tokens = sum(len(text) + 1 for text in said) + 10 * len("hello!")
    assert built.facts["data"]["tokens"] == tokens == sum(map(len, logps))
    evals = built.evaluate(built.state)
    _, (first,) = by_hand(built, 1)
    assert first["loss"] == pytest.approx(want, abs=1e-5)
    assert first["perplexity"] == pytest.approx(np.exp(want), rel=1e-5)
    assert evals["heldout/loss"] == pytest.approx(want, abs=1e-5)
    assert evals["heldout/perplexity"] == pytest.approx(np.exp(want), rel=1e-5)
    assert evals["heldout/tokens"] == tokens
    assert evals["heldout/answer_logp"] == pytest.approx(-want * tokens / 30, rel=1e-5)


def gradient(built, made, row_len, microbatches=1):
    """Gradient and objective of all of the training data in one batch of rows of that length."""
    from jaxreward.data import pipeline

    packed = pipeline.pack(built.train, row_len=row_len)
    rows = len(packed) + len(packed) % 2
    batches = pipeline.batches(built.train, row_len=row_len, batch=rows, seed=0, plan=packed)
    losses = sft.make_loss(built.plan, made.losses)
    slope = jax.jit(step.make_gradient(*losses, microbatches))
    rows = scorer.pair_rows(next(batches))
    grads, value, *_ = slope(built.state.params, built.frozen, rows, jax.random.key(0), {})
    return len(packed), jax.device_get((grads, value))


EACH = [pytest.param((), id="all")] + [
    pytest.param(mode, id=name, marks=pytest.mark.slow)
    for mode, name in ((LORA, "lora"), (TOP, "top"))
]


@pytest.mark.parametrize("mode", EACH)
def test_packing_and_microbatches_change_nothing(mode, tiny_folder, chats, tmp_path, one_device):
    """Catches a denominator per row, row length or microbatch, and neighbours that are seen."""
    made = config(tiny_folder, f"data.path={chats}", *mode)
    built = sft.build(made, tmp_path)
    longest = max(tree.size for tree in built.train)
    apart, one = gradient(built, made, longest)
    together, packed = gradient(built, made, 4 * longest)
    assert together < apart / 3
    _, cut = gradient(built, made, 4 * longest, microbatches=2)
    for other in (packed, cut):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, other)


def test_prompts_are_not_learnt(tiny_folder, chats, tmp_path, one_device):
    """Catches a gradient from prompt tokens: without supervised ones there is none, and no NaN."""
    made = config(tiny_folder, f"data.path={chats}")
    built = sft.build(made, tmp_path)
    rows = built.to_device(next(built.batches))
    rows = rows.replace(loss_mask=jnp.zeros_like(rows.loss_mask))
    slope = jax.jit(step.make_gradient(*sft.make_loss(built.plan, made.losses)))
    grads, value, *_ = slope(built.state.params, built.frozen, rows, jax.random.key(0), {})
    assert value == 0 and not any(np.asarray(g).any() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("mode", "counts"),
    [
        ((), (EMBED + 2 * LAYER + NORM, 0)),
        (LORA, (ADAPTERS, EMBED + 2 * LAYER + NORM)),
        (TOP, (LAYER + NORM, EMBED + LAYER)),
    ],
    ids=["all", "lora", "top"],
)
def test_learns_what_it_says_it_trains(mode, counts, tiny_folder, tmp_path, one_device):
    """Catches a head or a layer that is left out of training, and a learning rate that does not
    arrive."""
    made = config(tiny_folder, *mode, "train.steps=16", "optim.lr=1e-2")
    built = sft.build(made, tmp_path)
    trained, frozen = counts
    assert built.facts["parameters"] == {"trained": trained, "frozen": frozen}
    before = jax.device_get(built.state.params)
    now, metrics = by_hand(built, 16)
    after = jax.device_get(now.params)
    first, last = tr.flatten(before), tr.flatten(after)
    assert [path for path in first if np.array_equal(first[path], last[path])] == []
    # One layer over random states and a random table that stays learns least.
    fall = 0.6 if not mode else 0.97
    assert metrics[-1]["loss"] < fall * metrics[0]["loss"]
    assert built.evaluate(now)["heldout/loss"] < fall * metrics[0]["loss"]


def test_the_tied_head_is_trained(tiny_folder, tmp_path, one_device):
    """Catches a gradient of the table that comes from its use as embedding alone: bytes that are
    never read are still pushed down as answers."""
    made = config(tiny_folder)
    built = sft.build(made, tmp_path)
    rows = built.to_device(next(built.batches))
    slope = jax.jit(step.make_gradient(*sft.make_loss(built.plan, made.losses)))
    grads, *_ = slope(built.state.params, built.frozen, rows, jax.random.key(0), {})
    unread = np.setdiff1d(np.arange(259), np.asarray(rows.tokens))
    assert len(unread) > 100
    assert np.abs(np.asarray(grads["model"]["embed"]["table"])[unread]).max(axis=1).min() > 0


@pytest.mark.parametrize(
    ("mode", "count"),
    [((), 2 * EMBED + 2 * LAYER + NORM), (TOP, EMBED + LAYER + NORM), (("head",), EMBED)],
    ids=["all", "top", "head"],
)
def test_an_untied_head_is_trained(mode, count, untied_folder, tmp_path, one_device):
    """Catches an untied head that is dropped, as a reward model drops it, or stays as it was."""
    mode = ("models.policy.train=head",) if mode == ("head",) else mode
    built = sft.build(config(untied_folder, *mode, "optim.lr=1e-2"), tmp_path / "run")
    assert built.facts["parameters"]["trained"] == count
    before = jax.device_get(built.state.params)
    now, metrics = by_hand(built, 4)
    place = lambda params: (params if "head" in params else params["model"])["head"]["kernel"]
    assert np.abs(place(before) - place(jax.device_get(now.params))).max() > 1e-3
    assert metrics[-1]["loss"] < metrics[0]["loss"]


def test_resumed_equals_uninterrupted(finished, tmp_path):
    """Catches a data iterator, schedule or optimizer that starts anew: the same bits after 2 + 2
    steps as after 4."""
    made, workdir = finished
    again = tmp_path / "run"
    shutil.copytree(workdir, again)
    shutil.rmtree(again / "checkpoints" / "4")
    sft.run(made, again)
    built = sft.build(made, again)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), built.state.params
    )

    def saved(folder, at):
        with checkpoint.Checkpoints(folder) as checkpoints:
            return jax.device_get(checkpoints.params(like, step=at))

    first, second = saved(workdir, 4), saved(again, 4)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    middle = saved(workdir, 2)["model"]["embed"]["table"]
    assert not np.array_equal(first["model"]["embed"]["table"], middle)
    clock = lambda key: key.endswith("_per_second") or key == "train/mfu"
    drop = lambda line: {k: v for k, v in line.items() if not clock(k)}
    assert [drop(x) for x in lines(again)] == [drop(x) for x in lines(workdir)]


def test_what_a_run_leaves(finished, chats):
    """Catches a run that the report and the other commands cannot read."""
    made, workdir = finished
    assert made.recipe == "sft"
    environment = json.loads((workdir / "environment.json").read_text())
    assert environment["data"]["read"] == 30 and environment["eval_data"]["trees"] > 0
    assert environment["data"]["trees"] + environment["eval_data"]["trees"] == 30
    found = lines(workdir)
    assert [line["step"] for line in found] == [1, 2, 2, 3, 4, 4]
    for line in found:
        if "train/loss" in line:
            assert line["train/perplexity"] == pytest.approx(np.exp(line["train/loss"]), rel=1e-5)
    last = found[-1]
    assert last["eval/heldout/loss"] < found[2]["eval/heldout/loss"]
    with pytest.raises(ValueError, match=r"run of a language model.*jaxreward export"):
        evaluate.load_model(workdir)


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    """(run's own plan, parameters, frozen weights, held-out trees), and the exported folder."""
    made, workdir = finished
    out = tmp_path_factory.mktemp("exported") / "model"
    assert cli.main(["export", "--model", str(workdir), "--out", str(out), "--debug"]) == 0
    built = sft.build(made, workdir)
    with checkpoint.Checkpoints(workdir) as checkpoints:
        now, _, _ = checkpoints.restore(built.state)
    return built, now, out


def test_an_export_is_the_model_that_was_trained(exported):
    """Catches an export of the initial weights or without the head: the same log-probabilities and
    the same most likely tokens, from a folder that a language model is loaded from."""
    built, now, out = exported
    cfg, weights, score = load.load(out)
    assert score is None
    raw = json.loads((out / "config.json").read_text())
    assert raw["architectures"] == ["LlamaForCausalLM"]
    plan = trainable.Plan(cfg, "all", head=None)
    params, frozen = trainable.init(plan, weights, jax.random.key(0))
    want = likelihood.make_predict(built.plan, rules=built.rules)(
        now.params, built.frozen, built.heldout
    )
    got = likelihood.make_predict(plan)(params, frozen, built.heldout)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
    before = likelihood.make_predict(built.plan, rules=built.rules)(
        built.state.params, built.frozen, built.heldout
    )
    assert np.abs(np.concatenate(before) - np.concatenate(want)).max() > 0.1
    # Greedy: what each of the two finds most likely after every token.
    whole, _ = trainable.join(built.plan, now.params, built.frozen)
    assert set(tr.flatten(whole)) == set(tr.flatten(weights))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(whole), jax.device_get(weights))


@pytest.mark.parity
def test_transformers_finds_the_export_equally_likely(require, exported):
    """Catches a shift by one, a head that transformers does not read, or tokens of another
    rendering: log-probabilities of held-out answers by `AutoModelForCausalLM`."""
    require("torch")
    import torch
    from transformers import AutoModelForCausalLM

    built, _, out = exported
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    cfg, weights, _ = load.load(out)
    for tree in built.heldout[:4]:
        ids = np.concatenate([tree.prompt, *tree.answers])
        live = np.concatenate([np.zeros(len(tree.prompt), bool), *tree.loss])
        with torch.no_grad():
            logits = model(torch.tensor(ids[None].astype(np.int64))).logits[0]
        logps = torch.log_softmax(logits, dim=-1)[:-1].numpy()
        want = np.take_along_axis(logps, ids[1:, None], axis=1)[:, 0][live[1:]]
        np.testing.assert_allclose(alone(cfg, weights, tree), want, atol=2e-5)


@pytest.mark.parametrize("mode", [LORA, TOP], ids=["lora", "top"])
def test_parts_are_joined_for_export(mode, tiny_folder, tmp_path, one_device):
    """Catches adapters or lower layers that are lost on the way to the folder."""
    built = sft.build(config(tiny_folder, *mode, "optim.lr=3e-2"), tmp_path)
    now, _ = by_hand(built, 2)
    whole, score = trainable.join(built.plan, now.params, built.frozen)
    assert score is None
    tree = built.heldout[0]
    (got,) = likelihood.make_predict(built.plan)(now.params, built.frozen, [tree])
    np.testing.assert_allclose(got[0, 0], alone(built.plan.cfg, whole, tree).sum(), atol=1e-4)


def test_the_mesh_changes_nothing(tiny_folder, tmp_path):
    """Catches a head gathered or reduced twice, and tokens counted a device at a time."""

    def steps(folder, **sizes):
        made = config(tiny_folder, "optim.name=sgd", "optim.lr=0.1", "data.batch=4")
        made.mesh.update(sizes)
        built = sft.build(made, folder)
        devices = built.state.params["model"]["embed"]["table"].devices()
        return len(devices), *by_hand(built, 2)

    with pytest.MonkeyPatch.context() as patch:
        no_mesh(patch)
        count, one, metrics = steps(tmp_path / "one")
    assert count == 1
    count, other, again = steps(tmp_path / "other", data=2, fsdp=2)
    assert count == 4
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    jax.tree.map(close, *(jax.device_get(x.params) for x in (one, other)))
    for a, b in zip(metrics, again, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["data.path="], r"data\.path is empty; pass --config\.data\.path=FILE"),
        (["models.policy.head=scalar"], r"language model needs .*head='lm'; received .*'scalar'"),
        (["models.policy.train=head"], r"train='head' with a language head that is tied"),
        (["losses.ce.fn=preference.hinge"], r"preference\.hinge does not take softcap"),
    ],
)
def test_what_a_config_can_get_wrong(tiny_folder, tmp_path, overrides, text):
    """Catches faults that are told late, or not by the name of the field."""
    with pytest.raises(ValueError, match=text):
        sft.build(config(tiny_folder, *overrides), tmp_path)


def test_data_are_read_as_the_config_names_them(chats):
    """Catches a corpus without its keywords, and a message that knows of one kind of file only."""
    seen = {}

    def read(path, *, on_bad, corpus):
        seen.update(path=path, keywords=corpus.keywords)
        raise ValueError("enough")

    words = ["data.corpus=unpaired.pairs,most=3", f"data.path={chats}"]
    load = functools.partial(
        session.load_data, tokenizer=None, read=read, made=None, encode=None, what="pair"
    )
    with pytest.raises(ValueError, match="enough"):
        load(presets.load("sft/chat", words))
    assert seen == {"path": str(chats), "keywords": {"most": 3}}
    with pytest.raises(ValueError) as error:
        load(presets.load("sft/chat"))
    assert error.value.args[0] == (
        "data.path is empty; pass --config.data.path=FILE, which may be .jsonl, .parquet, "
        ".arrayrecord or tfds:NAME"
    )
