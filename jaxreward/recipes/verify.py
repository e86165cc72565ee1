"""A real checkpoint here against the same checkpoint in transformers: is it the same model?

Every text runs in both, unpadded, token for token the same. In float32 the two must agree but for
rounding; in bfloat16 we may be no further from float32 than transformers is, by a factor of
`SLACK`.

transformers has no class for a denoiser. It is compared with the causal model that it is but for
its mask, in the denoiser's mask and with the tensors of the folder.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxreward.core.types import Rows
from jaxreward.data import pairs as pair_data
from jaxreward.data import sources, tokenize
from jaxreward.hub import load
from jaxreward.models import decoder, families, heads
from jaxreward.parallel import rules
from jaxreward.sampling import autoregressive
from jaxreward.sampling.choose import Greedy

PyTree = Any
TEXTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List three prime numbers and say why each of them is prime.",
    "def mean(xs):\n    return sum(xs) / len(xs)\n\nExplain this function to a beginner, then "
    "write a version that does not fail on an empty list, and a test for each of the two.",
)
MAX_NEW = 16
# Root mean square of the difference, as a share of that of the reference.
FLOAT32 = 1e-4
SLACK = 2.0


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
      name: What is compared. dtype: Of the products here.
      ours: How far we are from transformers in float32 (or a count).
      theirs: How far transformers in bfloat16 is from it, or None in float32.
      limit: Most that passes. passed: Whether it did.
    """

    name: str
    dtype: str
    ours: float
    theirs: float | None
    limit: float
    passed: bool
    note: str = ""


@dataclasses.dataclass(frozen=True)
class _Side:
    """What one model makes of one text: states of all layers, and logits or scores at its end."""

    layers: list[np.ndarray]
    final: np.ndarray


def verify(
    folder: str | Path,
    *,
    pairs: str | Path | None = None,
    limit: int = 32,
    template: str = "auto",
) -> tuple[list[Check], dict]:
    """Compares a Hugging Face folder as we load it with what transformers makes of it.

    Args:
      folder: A language model, a denoiser, or a reward model with score.weight.
      pairs: Preference pairs to compare instead of the built-in texts; of a reward model also the
        share of pairs whose order changes.
      limit: Most pairs.
      template: "auto", "chat" or "plain".

    Returns:
      (the checks, facts: folder, what kind of model, texts, tokens, versions).

    Raises:
      FileNotFoundError, ValueError: as `hub.load.load`.
      ImportError: if torch is not installed.
    """
    torch, transformers = _torch()
    folder = Path(folder)
    where = rules.on_mesh()
    cfg, params, score = load.load(folder, rules=where)
    tokenizer = tokenize.load_tokenizer(folder)
    template = tokenize.chosen_template(tokenizer, template)
    texts, order = _texts(tokenizer, template, pairs, limit)
    kind = "ForCausalLM" if score is None else "ForSequenceClassification"
    if score is not None and "hidden" in score:
        kind = ""  # the bare model; the head lies beside it
    if score is None and not cfg.tied and "head" not in params:
        raise ValueError(f"{folder} has neither a language head nor a score head to compare")
    causal = cfg.mask == "causal"
    if causal:
        model = getattr(transformers, f"AutoModel{kind}").from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
        )
    else:
        model = _causal_twin(cfg, folder)
    model.eval()
    last = _head_theirs(model, folder) if score is not None else None
    checks: list[Check] = []
    want = [_theirs(model, text, last, cfg) for text in texts]
    answers = texts[: len(TEXTS)] if score is None and causal else []
    # Where transformers' first choice leads by less than rounding, either token is right.
    said = [_greedy_theirs(model, text) for text in answers]
    got = [_ours(cfg, params, score, text, where) for text in texts]
    checks += _numbers("float32", cfg, got, want, None, score)
    if answers:
        checks.append(_greedy(cfg, params, answers, said, where))
    model = model.to(torch.bfloat16)
    short = [_theirs(model, text, last, cfg) for text in texts]
    half = dataclasses.replace(cfg, compute="bfloat16")
    got_half = [_ours(half, params, score, text, where) for text in texts]
    checks += _numbers("bfloat16", cfg, got_half, want, short, score)
    if order:
        checks += _flips(order, got, got_half, want, short)
    return checks, {
        "folder": str(folder),
        "model": f"{cfg.family}, {_what(cfg, score)}",
        "texts": len(texts),
        "tokens": int(sum(map(len, texts))),
        "devices": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _what(cfg, score) -> str:
    if cfg.mask != "causal":
        return f"denoiser (mask {cfg.mask}, predict_offset {cfg.predict_offset}), masked by us"
    return "language model" if score is None else "reward model"


def table(checks: Sequence[Check], facts: dict) -> str:
    """The result as lines of text, with the verdict in the last."""
    lines = [f"{k:<14}{v}" for k, v in facts.items()]
    lines += ["", f"{'':<34}{'here':>12}{'transformers':>14}{'limit':>12}"]
    for c in checks:
        theirs = "" if c.theirs is None else f"{c.theirs:.3g}"
        lines.append(
            f"{c.dtype:<10}{c.name:<24}{c.ours:>12.3g}{theirs:>14}{c.limit:>12.3g}  "
            f"{'ok' if c.passed else 'DIFFERENT'}{c.note and '  ' + c.note}"
        )
    bad = [f"{c.name} ({c.dtype})" for c in checks if not c.passed]
    verdict = "the same model" if not bad else f"NOT the same model: {', '.join(bad)}"
    return "\n".join([*lines, "", "differences from transformers in float32", verdict])


def _torch():
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ImportError(
            "jaxreward verify compares with transformers in torch, which is not installed; the "
            "extra `parity` brings it: pip install 'jaxreward[parity]'"
        ) from error
    return torch, transformers


def _texts(tokenizer, template, pairs, limit):
    """([token ids of each text], [(chosen, rejected) as indices])."""
    if pairs is None:
        made = [tokenize.encode_conversation(tokenizer, t, template=template) for t in TEXTS]
        return [np.asarray(x.tokens, np.int32) for x in made], []
    records, _ = sources.read_pairs(pairs, limit=limit)
    trees, _ = pair_data.encode_pairs(tokenizer, records, template=template)
    texts, order = [], []
    for tree in trees:
        order += [(len(texts) + c, len(texts) + r) for c, r in tree.pairs]
        texts += [np.concatenate([tree.prompt, answer]) for answer in tree.answers]
    return texts, order


# transformers


def _head_theirs(model, folder):
    """State -> scores, by torch: the model's own head, or that of score.safetensors."""
    if hasattr(model, "score"):
        return lambda state: model.score(state)
    import torch
    from safetensors.torch import load_file

    head = load_file(folder / load.HEAD_FILE)

    def last(state):
        at = {name: x.to(state.dtype) for name, x in head.items()}
        linear = torch.nn.functional.linear
        hidden = torch.relu(linear(state, at["hidden.weight"], at["hidden.bias"]))
        return linear(hidden, at["out.weight"], at["out.bias"])

    return last


def _causal_twin(cfg, folder):
    """A denoiser's tensors, by their names in the folder, in the causal model of the same shape."""
    import torch
    import transformers
    from safetensors.torch import load_file

    family = {"llada": "qwen2" if cfg.bias else "llama", "Dream": "qwen2"}.get(cfg.family)
    alike = dict(family=family or cfg.family, mask="causal", block=0, predict_offset=1)
    twin = dataclasses.replace(cfg, **alike)
    raw = families.to_hf_config(twin)
    config = transformers.AutoConfig.for_model(**raw)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    stored = {}
    for path in sorted(set(load.weight_files(folder).values())):
        stored |= load_file(path)
    # Both tables go through the same leaves; only names differ, and layouts are not touched.
    ours = {e.ours: e.theirs for e in families.hf_table(cfg)}
    state = {
        e.theirs.format(layer=i): stored[ours[e.ours].format(layer=i)]
        for e in families.hf_table(twin)
        for i in range(cfg.depth if e.layered else 1)
    }
    if cfg.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


def _theirs(model, text, head, cfg) -> _Side:
    import torch

    ids = torch.tensor(np.asarray(text)[None], dtype=torch.long)
    seen = {}
    if cfg.mask != "causal":
        block = torch.arange(len(text)) // (cfg.block or len(text))
        hidden = torch.finfo(model.dtype).min * (block[None] > block[:, None])
        seen["attention_mask"] = hidden.to(model.dtype)[None, None]
    inner = model if head is not None and not hasattr(model, "score") else model.model
    with torch.no_grad():
        out = inner(input_ids=ids, output_hidden_states=True, use_cache=False, **seen)
        # Not the model's own choice of a token, which skips trailing ids that equal its pad id.
        last = out.last_hidden_state[:, -1]
        if head is not None:
            final = head(last)
        else:
            final = model(input_ids=ids, use_cache=False, **seen).logits[:, -1]
    return _Side([h[0].float().numpy() for h in out.hidden_states[1:]], final[0].float().numpy())


def _greedy_theirs(model, text):
    """(greedy tokens, lead of the first choice over the second at each of them)."""
    import torch

    ids = torch.tensor(np.asarray(text)[None], dtype=torch.long)
    said, lead = [], []
    with torch.no_grad():
        for _ in range(MAX_NEW):
            top = model(input_ids=ids, use_cache=False).logits[0, -1].topk(2)
            said.append(int(top.indices[0]))
            lead.append(float(top.values[0] - top.values[1]))
            ids = torch.cat([ids, top.indices[:1][None]], dim=1)
    return np.array(said), np.array(lead)


# Here


@functools.partial(jax.jit, static_argnames=("cfg", "where"))
def _layer(params, cfg, x, rows, where):
    return decoder.backbone(
        params,
        cfg,
        x,
        positions=rows.positions,
        segments=rows.segments,
        trunk=rows.trunk,
        rules=where,
    ).states


@functools.partial(jax.jit, static_argnames=("cfg", "where"))
def _embed(params, cfg, rows, where):
    return decoder.embed(params, cfg, rows, rules=where)


def _ours(cfg, params, score, text, where) -> _Side:
    """Layer by layer, in rows padded to a power of two: few programs, and few states at a time."""
    n = len(text)
    size = max(16, 1 << (n - 1).bit_length())
    tokens = np.pad(text, (0, size - n))[None].astype(np.int32)
    mask = np.arange(size)[None] < n
    segments = mask.astype(np.int32)
    positions = np.where(mask, np.arange(size, dtype=np.int32), 0)[..., None]
    rows = Rows(tokens, mask, mask, positions, segments, 0 * segments)
    x = _embed(params, cfg, rows, where)
    layers = []
    for i in range(cfg.depth):
        last = i == cfg.depth - 1
        one = dataclasses.replace(
            cfg,
            depth=1,
            windowed=cfg.windowed[i : i + 1],
            has_embed=False,
            has_norm=last,
            scan=False,
        )
        part = {"layers": jax.tree.map(lambda w: w[i : i + 1], params["layers"])}
        if last:
            part["norm"] = params["norm"]
        x = _layer(part, one, x, rows, where)
        layers.append(np.asarray(x[0, :n], np.float32))
    state = x[0, n - 1]
    if score is not None:
        final = heads.outputs(score, state[None, None])[0, 0]
    else:
        final = decoder.logits(state, decoder.head_matrix(params, cfg), cfg)
    return _Side(layers, np.asarray(final, np.float32))


def _greedy(cfg, params, texts, said, where) -> Check:
    """Greedy answers token for token, up to a place where transformers itself is undecided."""
    differ, undecided = 0, 0
    for text, (want, lead) in zip(texts, said):
        tokens, mask = np.asarray(text)[None], np.ones((1, len(text)), bool)
        keys = jax.random.split(jax.random.key(0), 1)
        none = np.array([-1], np.int32)
        out = _sample(params, cfg, tokens, mask, keys, none, where)
        wrong = np.flatnonzero(np.asarray(out.tokens[0]) != want)
        if len(wrong) and lead[wrong[0]] < 1e-3:
            undecided += 1
        elif len(wrong):
            differ += 1
    note = f"{undecided} left the path at a tie" if undecided else ""
    return Check("greedy answers differ", "float32", differ, None, 0, differ == 0, note)


@functools.partial(jax.jit, static_argnames=("cfg", "where"))
def _sample(params, cfg, tokens, mask, keys, stop, where):
    return autoregressive.sample(
        params,
        cfg,
        tokens,
        mask,
        keys,
        max_new=MAX_NEW,
        choose=Greedy(),
        stop=stop,
        rules=where,
    )


# Numbers


def _far(ours, want) -> float:
    """Root mean square of the difference over that of the reference, over all texts."""
    off = sum(float(np.sum(np.square(a - b, dtype=np.float64))) for a, b in zip(ours, want))
    size = sum(float(np.sum(np.square(b, dtype=np.float64))) for b in want)
    return float(np.sqrt(off / size)) if size else float(np.sqrt(off))


def _limit(theirs: float | None) -> float:
    return FLOAT32 if theirs is None else SLACK * max(theirs, FLOAT32)


def _numbers(dtype, cfg, got, want, short, score):
    """States (of the layer nearest to its limit, or beyond it) and logits or scores."""

    def compared(part):
        far = lambda sides: _far([part(side) for side in sides], [part(side) for side in want])
        theirs = None if short is None else far(short)
        ours, limit = far(got), _limit(theirs)
        # Written so that NaN does not pass.
        return dict(ours=ours, theirs=theirs, limit=limit, passed=bool(ours <= limit))

    layers = [compared(lambda side: side.layers[i]) for i in range(cfg.depth)]
    share = [np.nan_to_num(c["ours"] / c["limit"], nan=np.inf) for c in layers]
    worst = int(np.argmax(share))
    wrong = [i for i, c in enumerate(layers) if not c["passed"]]
    note = f"first in layer {wrong[0]} of {cfg.depth}" if wrong else ""
    name = "logits" if score is None else "scores"
    return [
        Check(f"states (layer {worst})", dtype, **layers[worst], note=note),
        Check(name, dtype, **compared(lambda side: side.final)),
    ]


def _flips(order, got, half, want, short):
    """Pairs that another arithmetic puts in another order, of those that a scalar score orders."""
    if want[0].final.shape != (1,):
        return []
    sign = lambda sides: np.sign([sides[c].final[0] - sides[r].final[0] for c, r in order])
    truth = sign(want)
    lead = np.abs([want[c].final[0] - want[r].final[0] for c, r in order])
    scale = np.std([side.final[0] for side in want]) or 1.0
    flips = lambda sides: int(np.sum((sign(sides) != truth) & (lead > FLOAT32 * scale)))
    exact, ours, theirs = flips(got), flips(half), flips(short)
    # A handful of near ties falls either way; more than twice theirs and three is a fault.
    limit = SLACK * theirs + 3
    note = f"of {len(order)}"
    return [
        Check("pairs flipped", "float32", exact, None, 0, exact == 0, note),
        Check("pairs flipped", "bfloat16", ours, theirs, limit, ours <= limit, note),
    ]
