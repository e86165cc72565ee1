"""Which checkpoints the decoder reads and writes: config.json and tensor names, family by family.

A family is what transformers calls `model_type`. `hf_config` turns a raw config.json into a
`decoder.Config` or names what it cannot honour; `to_hf_config` goes back; `hf_table` pairs our
leaves with a checkpoint's tensors. transformers' own defaults hold for absent fields (read in its
configuration files, release 5.12).

LLaDA and Dream are denoisers. transformers has no class for them, so what holds for absent fields
was read in the configuration files that come with their checkpoints. A denoiser that began as a
causal model keeps its family, and config.json says the rest under "jaxreward".
"""

import dataclasses
import math
from typing import Any

from jaxreward.models.attention import Scaling
from jaxreward.models.decoder import Config


@dataclasses.dataclass(frozen=True)
class Family:
    """What the checkpoints of one `model_type` have in common.

    Attributes:
      classes: Prefix of the transformers classes, "Llama" in `LlamaForCausalLM`; of a denoiser the
        whole name of its one class.
      fixed: Fields of `Config` that are the same in every checkpoint. A family with a `mask` here
        is one of denoisers.
      defaults: What transformers takes for a field that config.json leaves out.
      pattern: Which layers have a sliding window if config.json gives one and no `layer_types`:
        "none", "all", "upper" (from `max_window_layers`), "gemma2" or "gemma3" (every so many).
    """

    classes: str
    fixed: dict[str, Any]
    defaults: dict[str, Any]
    pattern: str = "none"


_GEMMA = dict(plus_one=True, embed_scale=True, post_norms=True, act="gelu_tanh")
_GEMMA_DEFAULTS = dict(
    head_dim=256, tie_word_embeddings=True, query_pre_attn_scalar=256, sliding_window=4096
)
FAMILIES = {
    "llama": Family("Llama", {}, {}),
    "mistral": Family("Mistral", {}, dict(num_key_value_heads=8, sliding_window=4096), "all"),
    "qwen2": Family("Qwen2", dict(bias=True), dict(sliding_window=4096), "upper"),
    "qwen3": Family("Qwen3", dict(qk_norm=True), dict(head_dim=128, sliding_window=4096), "upper"),
    "gemma2": Family(
        "Gemma2",
        _GEMMA,
        _GEMMA_DEFAULTS | dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
        "gemma2",
    ),
    "gemma3_text": Family("Gemma3Text", _GEMMA | dict(qk_norm=True), _GEMMA_DEFAULTS, "gemma3"),
    "Dream": Family(
        "DreamModel",
        dict(bias=True, mask="full", predict_offset=1),
        dict(num_key_value_heads=32, max_position_embeddings=32768, mask_token_id=151666)
        | dict(use_sliding_window=False),
    ),
    "llada": Family("LLaDAModelLM", dict(mask="full", predict_offset=0), {}),
}

_NEEDED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)
# Fields whose other values would change the computation in a way that the decoder does not
# implement. Everything else in config.json is either used below or does not affect it.
_MUST_BE = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "use_bidirectional_attention": (False,),
    "num_local_experts": (0,),
    "num_experts": (0,),
    "n_routed_experts": (0,),
    "pretraining_tp": (1,),
    "quantization_config": (),
    "attention_chunk_size": (),
    "no_rope_layers": (),
    "use_mrope": (False,),
}
# LLaDA's config.json has names of its own. Of the fields that change the computation: what its
# code takes where they are absent, and what the decoder implements.
_LLADA_NEEDED = ("d_model", "n_heads", "n_layers", "vocab_size", "mask_token_id")
_LLADA_MUST_BE = {
    "block_type": ("sequential", ("llama",)),
    "layer_norm_type": ("default", ("rms",)),
    "layer_norm_with_affine": (True, (True,)),
    "bias_for_layer_norm": (None, (None, False)),
    "attention_layer_norm": (False, (False,)),
    "activation_type": ("swiglu", ("silu",)),
    "include_bias": (False, (False,)),
    "rope": (False, (True,)),
    "rope_full_precision": (True, (True,)),
    "rope_scaling": (None, (None,)),
    "alibi": (False, (False,)),
    "input_emb_norm": (False, (False,)),
    "scale_logits": (False, (False,)),
    "block_group_size": (1, (1,)),
}
# Its tensors by those of Llama; silu goes over ff_proj.
_LLADA_NAMES = {
    "model.embed_tokens": "wte",
    "input_layernorm": "blocks.{layer}.attn_norm",
    "self_attn.q_proj": "blocks.{layer}.q_proj",
    "self_attn.k_proj": "blocks.{layer}.k_proj",
    "self_attn.v_proj": "blocks.{layer}.v_proj",
    "self_attn.o_proj": "blocks.{layer}.attn_out",
    "post_attention_layernorm": "blocks.{layer}.ff_norm",
    "mlp.gate_proj": "blocks.{layer}.ff_proj",
    "mlp.up_proj": "blocks.{layer}.up_proj",
    "mlp.down_proj": "blocks.{layer}.ff_out",
    "model.norm": "ln_f",
    "lm_head": "ff_out",
}
_LLAMA3 = dict(
    low="low_freq_factor", high="high_freq_factor", original="original_max_position_embeddings"
)
_DENOISER = ("mask", "block", "predict_offset", "mask_id")  # in config.json under "jaxreward"
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


def hf_config(raw: dict) -> Config:
    """Config of a checkpoint from its raw config.json.

    Reads both spellings of the rotary parameters: `rope_theta` with `rope_scaling`, and
    `rope_parameters` of newer files, which wins where a file has both. An entry
    "jaxreward": {"denoiser": {...}}, as `to_hf_config` writes it, makes a denoiser of the model.

    Raises:
      ValueError: naming every field whose value the decoder does not implement, or what is wrong
        with the entry.
    """
    kind = raw.get("model_type", "llama")
    if kind not in FAMILIES:
        hint = ""
        if isinstance(raw.get("text_config"), dict):
            hint = "; a model of text and images: export its language model alone"
        raise ValueError(
            f"config.json asks for model_type={kind!r}, which is not supported{hint}. "
            f"Supported: {', '.join(FAMILIES)}"
        )
    cfg = _llada_config(raw) if kind == "llada" else _config(raw, kind)
    if "mask" in FAMILIES[kind].fixed and cfg.heads * cfg.head_dim != cfg.width:
        raise ValueError(
            f"config.json ({kind}): {cfg.heads} heads of {cfg.head_dim} do not make up {cfg.width}"
        )
    return _denoiser(cfg, raw)


def _config(raw: dict, kind: str) -> Config:
    family = FAMILIES[kind]
    at = family.defaults | {k: v for k, v in raw.items() if v is not None}
    explicit_none = {k for k, v in raw.items() if v is None} & {
        "sliding_window",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "num_key_value_heads",
        "head_dim",
        "mask_token_id",
    }
    at = {k: v for k, v in at.items() if k not in explicit_none}
    problems = [f"missing {f}" for f in _NEEDED if f not in at]
    problems += [f"{f}={at[f]!r}" for f, ok in _MUST_BE.items() if f in at and at[f] not in ok]
    gemma = kind.startswith("gemma")
    if gemma:
        act, allowed = at.get("hidden_activation", "gelu_pytorch_tanh"), ("gelu_pytorch_tanh",)
    else:
        act, allowed = at.get("hidden_act", "silu"), ("silu", "swish")
    if act not in allowed:
        problems.append(f"hidden_act={act!r}")
    if family.pattern == "none":
        if at.get("use_sliding_window") is False:
            at.pop("sliding_window", None)
        local = at.get("sliding_window") or _LOCAL in (at.get("layer_types") or ())
        problems += [
            f"{f}={at[f]!r}" for f in ("sliding_window", "layer_types") if f in at and local
        ]
        problems += ["use_sliding_window=True"] if at.get("use_sliding_window") else []
    if kind == "gemma3_text" and at.get("attn_logit_softcapping"):
        problems.append(f"attn_logit_softcapping={at['attn_logit_softcapping']!r}")
    masked = "mask" in family.fixed and "vocab_size" in at
    mask_id = _mask_id(at, at["vocab_size"], problems) if masked else -1
    ropes, found = _ropes(at, kind)
    problems += found
    if problems:
        raise ValueError(
            f"config.json ({kind}) asks for what this decoder lacks: {'; '.join(problems)}"
        )
    depth, heads = at["num_hidden_layers"], at["num_attention_heads"]
    windowed = _windowed(at, family, depth)
    if kind == "gemma3_text":
        theta = ropes[_GLOBAL][0]
        rotary = dict(window_theta=ropes[_LOCAL][0] if any(windowed) else 0.0)
    else:
        theta, rotary = ropes[_GLOBAL][0], {}
    return Config(
        vocab=at["vocab_size"],
        width=at["hidden_size"],
        depth=depth,
        heads=heads,
        kv_heads=at.get("num_key_value_heads") or heads,
        head_dim=at.get("head_dim") or at["hidden_size"] // heads,
        mlp=at["intermediate_size"],
        rope_theta=theta,
        rope_scaling=ropes[_GLOBAL][1],
        norm_eps=float(at.get("rms_norm_eps", 1e-6)),
        tied=bool(at.get("tie_word_embeddings", False)),
        family=kind,
        query_scalar=float(at["query_pre_attn_scalar"]) if gemma else 0.0,
        attn_softcap=float(at.get("attn_logit_softcapping") or 0.0) if kind == "gemma2" else 0.0,
        logit_softcap=float(at.get("final_logit_softcapping") or 0.0) if gemma else 0.0,
        window=int(at["sliding_window"]) if any(windowed) else 0,
        windowed=windowed,
        max_len=at.get("max_position_embeddings", 2048),
        **rotary,
        mask_id=mask_id,
        **family.fixed,
    )


def _llada_config(raw: dict) -> Config:
    """As `_config`, for LLaDA's own names."""
    at = {f: default for f, (default, _) in _LLADA_MUST_BE.items()} | raw
    problems = [f"missing {f}" for f in _LLADA_NEEDED if f not in raw]
    problems += [f"{f}={at[f]!r}" for f, (_, ok) in _LLADA_MUST_BE.items() if at[f] not in ok]
    problems += [f"{f}={at[f]!r}" for f, ok in _MUST_BE.items() if at.get(f) and at[f] not in ok]
    if not any(p.startswith("missing") for p in problems):
        width, heads, queries = at["d_model"], at["n_heads"], at.get("multi_query_attention")
        kv_heads = at.get("n_kv_heads") or (1 if queries else heads)
        if queries is not None and kv_heads != (1 if queries else heads):
            problems.append(f"multi_query_attention={queries!r} with n_kv_heads={kv_heads}")
        # The tables have this many rows; the tokenizer may know fewer tokens.
        vocab = at.get("embedding_size", 50304) or at["vocab_size"]
        if vocab < at["vocab_size"]:
            problems.append(f"embedding_size={vocab} below vocab_size={at['vocab_size']}")
        mask_id = _mask_id(at, vocab, problems)
    if problems:
        raise ValueError(
            f"config.json (llada) asks for what this decoder lacks: {'; '.join(problems)}"
        )
    return Config(
        vocab=vocab,
        width=width,
        depth=at["n_layers"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width // heads,
        mlp=at.get("mlp_hidden_size") or at.get("mlp_ratio", 4) * width,
        rope_theta=float(at.get("rope_theta", 1e4)),
        norm_eps=float(at.get("rms_norm_eps", 1e-5)),
        tied=bool(at.get("weight_tying", True)),
        family="llada",
        bias=bool(at.get("include_qkv_bias")),
        max_len=at.get("max_sequence_length", 1024),
        mask_id=mask_id,
        **FAMILIES["llada"].fixed,
    )


def _mask_id(at: dict, vocab: int, problems: list[str]) -> int:
    found = at.get("mask_token_id")
    if type(found) is int and 0 <= found < vocab:
        return found
    if found is not None:
        problems.append(f"mask_token_id={found!r} in a vocabulary of {vocab}")
    return -1


def _denoiser(cfg: Config, raw: dict) -> Config:
    """`cfg` with what config.json says of a denoiser under "jaxreward", if it does."""
    ours = raw.get("jaxreward")
    if not isinstance(ours, dict) or "denoiser" not in ours:
        return cfg
    entry = ours["denoiser"]
    if not isinstance(entry, dict) or set(entry) != set(_DENOISER):
        raise ValueError(
            f"config.json: jaxreward.denoiser must hold {', '.join(_DENOISER)}, all of them and "
            f"nothing else; it is {entry!r}"
        )
    counts = all(type(entry[n]) is int for n in _DENOISER if n != "mask")
    if entry["mask"] not in ("full", "block") or not counts:
        raise ValueError(
            f"config.json: jaxreward.denoiser={entry}: mask must be full or block, and the others "
            "whole numbers"
        )
    try:
        return dataclasses.replace(cfg, **entry)
    except ValueError as error:
        raise ValueError(f"config.json: jaxreward.denoiser: {error}") from error


def as_denoiser(
    cfg: Config, *, mask_id: int, mask: str = "full", block: int = 0, predict_offset: int = 1
) -> Config:
    """A causal model as the start of a denoiser: the same weights under another mask.

    `predict_offset=1` keeps the shift that the causal model was trained with: the state at t goes
    on predicting token t+1, so what it has learned stays of use. With 0 the state at a masked
    position predicts that position, as in LLaDA, which it has to learn anew.

    Args:
      cfg: A causal model of any family without windowed layers.
      mask_id: Token that stands for a masked position; the vocabulary has it, and no text does.
      mask: "full", or "block" with `block` positions a block.
      block: Positions a block, 0 unless `mask` is "block".
      predict_offset: 1 or 0.

    Returns:
      The config of the denoiser; parameters stay as they are.

    Raises:
      ValueError: if `cfg` is a denoiser already or has windowed layers, if `mask` is causal, or if
        `mask_id` is no token of the vocabulary.

    References:
      Ye et al., "Dream 7B: Diffusion Large Language Models" (arXiv:2508.15487), which starts from
      Qwen2.5 and keeps the shift.
    """
    if cfg.mask != "causal":
        raise ValueError(f"this model is a denoiser already: mask={cfg.mask!r}")
    if mask == "causal":
        raise ValueError("a denoiser has mask='full', or 'block' with a block; received 'causal'")
    if any(cfg.windowed):
        raise ValueError(
            f"{sum(cfg.windowed)} of {cfg.depth} layers have a sliding window: not in a denoiser"
        )
    if not 0 <= mask_id < cfg.vocab:
        raise ValueError(
            f"mask_id={mask_id} is no token of a vocabulary of {cfg.vocab}; name a reserved one"
        )
    return dataclasses.replace(
        cfg, mask=mask, block=block, predict_offset=predict_offset, mask_id=mask_id
    )


def _ropes(at: dict, kind: str):
    """({layer type: (theta, scaling)}, problems) of all spellings."""
    given = at.get("rope_parameters") or {}
    if not isinstance(given, dict):
        return {}, [f"rope_parameters={given!r}"]
    old = at.get("rope_scaling") or {}
    default = 1e6 if kind == "gemma3_text" else 1e4
    whole = given.get(_GLOBAL, {} if _LOCAL in given else given) or {}
    local = given.get(_LOCAL) or {}
    if not isinstance(whole, dict) or not isinstance(local, dict) or not isinstance(old, dict):
        return {}, [f"rope_parameters={given!r}"]
    whole = {"rope_theta": at.get("rope_theta", default)} | old | whole
    local = {"rope_theta": at.get("rope_local_base_freq", 1e4)} | local
    if kind != "gemma3_text" and given.get(_LOCAL) not in (None, given.get(_GLOBAL)):
        return {}, ["rope_parameters that differ between layers"]
    problems: list[str] = []
    ropes = {}
    for name, rope in ((_GLOBAL, whole), (_LOCAL, local)):
        scaling = _scaling(rope, at, problems)
        if name == _LOCAL and scaling is not None:
            problems.append(f"rope_parameters.{_LOCAL}.rope_type={rope.get('rope_type')!r}")
        ropes[name] = (float(rope.get("rope_theta") or default), scaling)
    return ropes, problems


def _scaling(rope: dict, at: dict, problems: list[str]) -> Scaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f"partial_rotary_factor={rope['partial_rotary_factor']!r}")
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        problems.append(f"rope_type={kind!r}")
        return None
    needed = ["factor"] + (["low_freq_factor", "high_freq_factor"] if kind == "llama3" else [])
    lacking = [f"rope_type={kind!r} without {n}" for n in needed if n not in rope]
    if lacking:
        problems += lacking
        return None
    if kind == "linear":
        return Scaling("linear", float(rope["factor"]))
    values = {ours: rope.get(theirs) for ours, theirs in _LLAMA3.items()}
    # transformers' order: beside the rotary parameters' own value, the file's, then the length.
    original = at.get("original_max_position_embeddings") or values["original"]
    values["original"] = int(original or at.get("max_position_embeddings", 2048))
    return Scaling("llama3", float(rope["factor"]), **values)


def _windowed(at: dict, family: Family, depth: int) -> tuple[bool, ...]:
    """Which layers have a sliding window; () if none has."""
    if family.pattern == "none" or not at.get("sliding_window"):
        return ()
    if family.pattern == "upper" and not at.get("use_sliding_window", False):
        return ()
    types = at.get("layer_types")
    if types is not None and family.pattern != "all":
        unknown = sorted(set(types) - {_LOCAL, _GLOBAL})
        if unknown or len(types) != depth:
            raise ValueError(
                f"config.json: layer_types has {len(types)} entries for {depth} layers"
                + f" and unknown ones: {', '.join(map(str, unknown))}" * bool(unknown)
            )
        flags = tuple(t == _LOCAL for t in types)
    elif family.pattern == "upper":
        flags = tuple(i >= at.get("max_window_layers", 28) for i in range(depth))
    else:
        every = {"all": depth + 1, "gemma2": 2}.get(
            family.pattern, at.get("sliding_window_pattern", 6)
        )
        flags = tuple(bool((i + 1) % every) for i in range(depth))
    return flags if any(flags) else ()


def to_hf_config(cfg: Config) -> dict:
    """config.json of a model of this shape; how it is run (compute, scan, remat) is not in it.

    What makes a denoiser of a model whose family is causal, or another denoiser of one whose family
    is not, stands under "jaxreward": {"denoiser": {"mask", "block", "predict_offset", "mask_id"}}.

    Raises:
      ValueError: if LLaDA's or Dream's cannot hold it: a causal mask, or heads beside the width.
    """
    fixed = FAMILIES[cfg.family].fixed
    if "mask" in fixed and (cfg.mask == "causal" or cfg.heads * cfg.head_dim != cfg.width):
        raise ValueError(
            f"a checkpoint of {cfg.family} is a denoiser with heads that make up its width; "
            f"received mask={cfg.mask!r} and {cfg.heads} heads of {cfg.head_dim} in {cfg.width}"
        )
    raw = _llada_raw(cfg) if cfg.family == "llada" else _raw(cfg)
    entry = {n: getattr(cfg, n) for n in _DENOISER}
    usual = {"mask": "causal", "block": 0, "predict_offset": 1, **fixed}
    if cfg.mask == "causal" or all(usual.get(n, x) == x for n, x in entry.items()):
        return raw
    return raw | {"jaxreward": {"denoiser": entry}}


def _llada_raw(cfg: Config) -> dict:
    """Every field that LLaDA's code needs: its defaults are those of another model."""
    return {field: ok[-1] for field, (_, ok) in _LLADA_MUST_BE.items()} | {
        "architectures": [FAMILIES["llada"].classes],
        "model_type": "llada",
        **dict.fromkeys(("vocab_size", "embedding_size"), cfg.vocab),
        "d_model": cfg.width,
        "n_layers": cfg.depth,
        "n_heads": cfg.heads,
        "n_kv_heads": cfg.kv_heads,
        "multi_query_attention": None,
        "mlp_hidden_size": cfg.mlp,
        "include_qkv_bias": cfg.bias,
        "rope_theta": cfg.rope_theta,
        "rms_norm_eps": cfg.norm_eps,
        "weight_tying": cfg.tied,
        "max_sequence_length": cfg.max_len,
        "mask_token_id": cfg.mask_id if cfg.mask_id >= 0 else None,
        **dict.fromkeys(("attention_dropout", "embedding_dropout", "residual_dropout"), 0.0),
    }


def _raw(cfg: Config) -> dict:
    family = FAMILIES[cfg.family]
    rope = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    scaling = cfg.rope_scaling
    if scaling is not None:
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {theirs: getattr(scaling, ours) for ours, theirs in _LLAMA3.items()}
    raw = {
        "architectures": [f"{family.classes.removesuffix('Text')}ForCausalLM"],
        "model_type": cfg.family,
        "vocab_size": cfg.vocab,
        "hidden_size": cfg.width,
        "num_hidden_layers": cfg.depth,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim,
        "intermediate_size": cfg.mlp,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"} if scaling else None,
        "rope_parameters": rope,
        "tie_word_embeddings": cfg.tied,
        "max_position_embeddings": cfg.max_len,
    }
    if "mask" in family.fixed:
        raw["architectures"] = [family.classes]
        raw["mask_token_id"] = cfg.mask_id if cfg.mask_id >= 0 else None
        raw["use_sliding_window"] = False
    if cfg.family in ("llama", "qwen3") or cfg.plus_one:
        raw["attention_bias"] = False
    if cfg.family == "llama":
        raw["mlp_bias"] = False
    if family.pattern != "none":
        raw["sliding_window"] = cfg.window or None
    if family.pattern == "upper":
        raw["use_sliding_window"] = bool(cfg.windowed)
    if family.pattern not in ("none", "all"):
        kinds = cfg.windowed or (False,) * cfg.depth
        raw["layer_types"] = [_LOCAL if local else _GLOBAL for local in kinds]
    if not cfg.plus_one:
        return raw | {"hidden_act": "silu"}
    raw |= {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": cfg.query_scalar,
        "final_logit_softcapping": cfg.logit_softcap or None,
        "attn_logit_softcapping": cfg.attn_softcap or None,
    }
    if cfg.query_scalar == int(cfg.query_scalar):
        raw["query_pre_attn_scalar"] = int(cfg.query_scalar)
    if cfg.family == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": cfg.window_theta or 1e4}
        raw["rope_local_base_freq"] = local["rope_theta"]
        raw["rope_parameters"] = {_GLOBAL: rope, _LOCAL: local}
    return raw


@dataclasses.dataclass(frozen=True)
class Entry:
    """One correspondence between our leaves and a checkpoint's tensors.

    Attributes:
      ours: Our path.
      theirs: Serialised name; "{layer}" stands for the layer number, and then the functions see
        one layer at a time.
      to: Our array to theirs. `back`: theirs to ours.
    """

    ours: str
    theirs: str
    to: Any
    back: Any

    @property
    def layered(self) -> bool:
        """There is one tensor a layer."""
        return "{layer}" in self.theirs


def hf_table(cfg: Config) -> tuple[Entry, ...]:
    """Names and layouts of a checkpoint. Torch keeps [out, in]; we keep [in..., out...]."""
    D, H, N, K, F = cfg.width, cfg.head_dim, cfg.heads, cfg.kv_heads, cfg.mlp
    same = lambda x: x
    transpose = lambda x: x.T

    def linear(ours, theirs, inner, outer):
        return Entry(
            f"layers/{ours}/kernel",
            f"model.layers.{{layer}}.{theirs}.weight",
            lambda x: x.reshape(-1, math.prod(outer)).T,
            lambda x: x.T.reshape(*inner, *outer),
        )

    def bias(ours, theirs, outer):
        return Entry(
            f"layers/{ours}/bias",
            f"model.layers.{{layer}}.{theirs}.bias",
            lambda x: x.reshape(-1),
            lambda x: x.reshape(*outer),
        )

    def norm(ours, theirs):
        return Entry(f"layers/{ours}/scale", f"model.layers.{{layer}}.{theirs}.weight", same, same)

    table = [
        Entry("embed/table", "model.embed_tokens.weight", same, same),
        norm("attn_norm", "input_layernorm"),
        linear("attn/q", "self_attn.q_proj", (D,), (N, H)),
        linear("attn/k", "self_attn.k_proj", (D,), (K, H)),
        linear("attn/v", "self_attn.v_proj", (D,), (K, H)),
        linear("attn/o", "self_attn.o_proj", (N, H), (D,)),
        linear("mlp/gate", "mlp.gate_proj", (D,), (F,)),
        linear("mlp/up", "mlp.up_proj", (D,), (F,)),
        linear("mlp/down", "mlp.down_proj", (F,), (D,)),
        Entry("norm/scale", "model.norm.weight", same, same),
    ]
    if cfg.post_norms:
        table += [
            norm("attn_post", "post_attention_layernorm"),
            norm("mlp_norm", "pre_feedforward_layernorm"),
            norm("mlp_post", "post_feedforward_layernorm"),
        ]
    else:
        table.append(norm("mlp_norm", "post_attention_layernorm"))
    if cfg.bias:
        outer = {"q": (N, H), "k": (K, H), "v": (K, H)}
        table += [bias(f"attn/{n}", f"self_attn.{n}_proj", s) for n, s in outer.items()]
    if cfg.qk_norm:
        table += [norm(f"attn/{n}_norm", f"self_attn.{n}_norm") for n in "qk"]
    if not cfg.tied:
        table.append(Entry("head/kernel", "lm_head.weight", transpose, transpose))
    if cfg.family == "llada":
        table = [dataclasses.replace(e, theirs=_llada_name(e.theirs)) for e in table]
    return tuple(table)


def _llada_name(name: str) -> str:
    stem, _, kind = name.removeprefix("model.layers.{layer}.").rpartition(".")
    return f"model.transformer.{_LLADA_NAMES[stem]}.{kind}"
