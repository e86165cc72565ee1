"""Which part of a model is trained: everything, LoRA adapters, the top layers, or the head alone.

The optimizer sees `params`; what stays as it was is `frozen`, a separate argument of the step.
Layers below the first trained one can run once for the whole data set (`features`), since their
output never changes; the upper part then starts from `rows.features`.

    train="all"    params {model, score}      frozen {}
    train="top"    params {model, score}      frozen {policy: {lower}}          model = upper layers
    train="lora"   params {adapters, score}   frozen {policy: {lower?, upper}}
    train="head"   params {score}             frozen {policy: {lower, upper}}   upper = final norm

That is a reward model. A language model (`head=None`) has no score; its head is

    untied   in model with "all" and "top", the one thing trained with "head", frozen with "lora"
    tied     the embedding: trained with "all", frozen otherwise, since frozen layers read it

and, with `value`, a critic's linear head {value} on the same states. It is no part of the model:
`join`, and with it sampling and export, leave it out.
"""

import dataclasses
from typing import Any

import jax
from jaxtyping import Float, Int

from jaxreward.core.types import Array, Rows
from jaxreward.models import decoder, heads, lora
from jaxreward.parallel import specs as sp
from jaxreward.parallel.rules import Rules

PyTree = Any
MODES = ("all", "lora", "top", "head")
LANGUAGE = "lm"  # in a config: the head is the language model's own


@dataclasses.dataclass(frozen=True)
class Plan:
    """A model, and what of it is trained. Hashable.

    Attributes:
      cfg: The whole model.
      train: "all", "lora", "top" or "head".
      top_layers: Upper layers that are trained ("top") or adapted ("lora"; 0 = every layer).
      lora: Rank, scale and targets, for "lora".
      head: What a reward model gives for an answer; None for a language model.
      value: A language model has a scalar value head (of a critic) beside its own, always trained.
    """

    cfg: decoder.Config
    train: str = "all"
    top_layers: int = 0
    lora: "lora.Config | None" = None
    head: heads.Config | None = heads.SCALAR
    value: bool = False

    def __post_init__(self):
        if self.value and self.head is not None:
            raise ValueError(
                "a value head stands beside the head of a language model, head='lm'; for a reward "
                "model set value=false"
            )
        if self.head is None and self.train == "head" and self.cfg.tied:
            raise ValueError(
                "train='head' with a language head that is tied to the embedding: training it "
                "would change what the frozen layers read; use train='top', 'lora' or 'all'"
            )
        if self.train not in MODES:
            raise ValueError(f"unknown train={self.train!r}; use one of {', '.join(MODES)}")
        if self.train == "top" and not 1 <= self.top_layers < self.cfg.depth:
            raise ValueError(
                f"train='top' needs top_layers in 1..{self.cfg.depth - 1}; received "
                f"{self.top_layers}. Use train='all' for the whole model, 'head' for none"
            )
        if self.train == "lora" and (
            self.lora is None or not 0 <= self.top_layers <= self.cfg.depth
        ):
            raise ValueError(
                f"train='lora' needs lora_rank >= 1 and top_layers in 0..{self.cfg.depth}; "
                f"received {self.lora} and {self.top_layers}"
            )

    @property
    def cut(self) -> int:
        """Number of lower layers that no gradient reaches."""
        if self.train == "head":
            return self.cfg.depth
        if self.train == "all" or not self.top_layers:
            return 0
        return self.cfg.depth - self.top_layers

    @property
    def lower(self) -> decoder.Config:
        """The frozen lower part; only meaningful when `cut` > 0."""
        return decoder.split(self.cfg, self.cut)[0]

    @property
    def upper(self) -> decoder.Config:
        """The part that starts at the cut: the whole model when nothing is cut."""
        return decoder.split(self.cfg, self.cut)[1] if self.cut else self.cfg


def make_plan(
    cfg: decoder.Config, role: Any, *, name: str = "policy", language: bool | None = None
) -> Plan:
    """The plan that one entry of a config's `models` asks for.

    Args:
      cfg: The model.
      role: Has `family`, `head`, `train`, `top_layers`, `lora_rank`, `lora_alpha`, `lora_targets`;
        `outputs`, `output_weights`, `head_hidden` and `head_dropout` where they are not the
        defaults of a scalar head, and `value` where there is a value head.
      name: Of the entry, for messages.
      language: Whether the caller can train a language model (True), a reward model (False) or
        either (None).

    Raises:
      ValueError: naming the field that does not fit.
    """
    known = {True: (LANGUAGE,), False: heads.KINDS, None: (*heads.KINDS, LANGUAGE)}[language]
    if role.family != "decoder" or role.head not in known:
        what = {False: "a reward model", True: "a language model", None: "a model"}[language]
        raise ValueError(
            f"models.{name}: {what} needs family='decoder' and "
            f"head={' or '.join(map(repr, known))}; received "
            f"family={role.family!r}, head={role.head!r}"
        )
    if cfg.mask != "causal" and role.head != LANGUAGE:
        raise ValueError(
            f"models.{name}: a head on answers needs a causal model, since rows share prompts; "
            f"models.{name}.init is a denoiser (mask={cfg.mask!r})"
        )
    adapters = None
    if role.train == "lora":
        adapters = lora.Config(role.lora_rank, float(role.lora_alpha), role.lora_targets)
    head = None if role.head == LANGUAGE else make_head(role, name=name)
    return Plan(cfg, role.train, role.top_layers, adapters, head, bool(role.get("value", False)))


def make_head(role: Any, *, name: str = "policy") -> heads.Config:
    """The head that one entry of a config's `models` asks for, see `make_plan`.

    Raises:
      ValueError: naming the entry and what does not fit.
    """
    try:
        return heads.Config(
            role.head,
            tuple(role.get("outputs", ())) or heads.SCALAR.outputs,
            tuple(map(float, role.get("output_weights", ()))),
            role.get("head_hidden", 0),
            role.get("head_dropout", 0.0),
        )
    except ValueError as error:
        raise ValueError(f"models.{name}: {error}") from error


def _upper_specs(plan):
    tree = decoder.specs(plan.upper)
    if plan.head is None:
        return tree
    # A reward needs states, not logits: an untied language head is dropped, here and on export.
    return {k: v for k, v in tree.items() if k != "head"}


def param_specs(plan: Plan) -> PyTree:
    """Leaves that the optimizer updates."""
    tree, upper = {}, _upper_specs(plan)
    if plan.head is not None:
        tree["score"] = heads.specs(plan.head, plan.cfg.width)
    elif plan.train == "head":
        tree["head"] = upper["head"]
    if plan.value:
        tree["value"] = heads.specs(heads.SCALAR, plan.cfg.width)
    if plan.train in ("all", "top"):
        tree["model"] = upper
    if plan.train == "lora":
        # The layers run with adapters; a head is read as it is.
        without = {k: v for k, v in upper.items() if k != "head"}
        tree["adapters"] = lora.specs(without, plan.lora)
    return tree


def split(plan: Plan, weights: PyTree) -> tuple[PyTree, PyTree]:
    """The weights of a whole decoder as (initial trained part, frozen part).

    The trained part holds "model" or an untied language "head" only; `init` adds new adapters and
    the scalar head.

    Raises:
      ValueError: if a language head is wanted and the weights have none.
    """
    language = plan.head is None
    if language and not plan.cfg.tied and "head" not in weights:
        raise ValueError(
            "the initial model has no language head (lm_head.weight): it is a reward model whose "
            "untied head is gone; start from a language model"
        )
    upper = {k: v for k, v in weights.items() if language or k != "head"}
    frozen = {}
    if plan.cut:
        lower, upper = decoder.split_params(upper, plan.cut)
        frozen["lower"] = lower
    trained = {}
    if plan.train in ("all", "top"):
        trained["model"] = upper
    else:
        if language and plan.train == "head":
            trained["head"] = upper.pop("head")
        frozen["upper"] = upper
    return trained, ({"policy": frozen} if frozen else {})


def init(
    plan: Plan,
    weights: PyTree,
    key: jax.Array,
    *,
    score: PyTree | None = None,
    rules: Rules | None = None,
) -> tuple[PyTree, PyTree]:
    """(params, frozen) from a whole decoder's weights.

    Args:
      plan: What is trained.
      weights: Tree of `decoder.specs(plan.cfg)`; its buffers may be shared with the result.
      key: For new adapters and a new head; the same key gives the same head in every mode.
      score: Head of an imported reward model to go on from, or None for a new one. A language
        model ignores it.
      rules: Mesh and layouts.

    Raises:
      ValueError: if the imported head has another number of scores.
    """
    params, frozen = split(plan, weights)
    described = param_specs(plan)
    if plan.head is None:
        score = None
    if score is not None:
        sp.check({"score": score}, {"score": described["score"]}, what="the imported score head")
    new = {k: v for k, v in described.items() if k not in params}
    if score is not None:
        del new["score"]
        params["score"] = score
    if new:
        params.update(sp.init(new, key, rules=rules))
    return params, frozen


def join(plan: Plan, params: PyTree, frozen: PyTree) -> tuple[PyTree, PyTree | None]:
    """(whole decoder, score head): adapters merged, parts put together.

    A reward model's decoder comes without language head; a language model has no score head.
    """
    base = frozen.get("policy", {})
    upper = params["model"] if "model" in params else base["upper"]
    if plan.train == "lora":
        scale = plan.lora.alpha / plan.lora.rank
        upper = lora.merge(upper, params["adapters"], scale)
    if "head" in params:
        upper = {**upper, "head": params["head"]}
    whole = decoder.join_params(base["lower"], upper) if plan.cut else upper
    return whole, params.get("score")


def features(plan: Plan, frozen: PyTree, rows: Rows, *, rules: Rules | None = None):
    """Inputs of the first trained layer, [B,T,D] in the compute dtype: the lower layers' output."""
    lower = frozen["policy"]["lower"]
    x = decoder.embed(lower, plan.lower, rows.replace(features=None), rules=rules)
    hidden = decoder.backbone(
        lower,
        plan.lower,
        x,
        positions=rows.positions,
        segments=rows.segments,
        trunk=rows.trunk,
        rules=rules,
    )
    return hidden.states


def states(
    plan: Plan,
    params: PyTree,
    frozen: PyTree,
    rows: Rows,
    *,
    rules: Rules | None = None,
    ends: Int[Array, "B K"] | None = None,
) -> Float[Array, "B T D"]:
    """Final hidden states, from cached features when the rows carry them.

    Gradients flow to `params` only. With `ends`, the last slots of segments (-1 for none), only
    their states are computed, [B,K,D].
    """
    if plan.cut and rows.features is None:
        below = jax.lax.stop_gradient(features(plan, frozen, rows, rules=rules))
        rows = rows.replace(features=below)
    upper = params["model"] if "model" in params else frozen["policy"]["upper"]
    adapters = None
    if plan.train == "lora":
        adapters = lora.Adapters(params["adapters"], plan.lora.alpha / plan.lora.rank)
    hidden = decoder.backbone(
        upper,
        plan.upper,
        decoder.embed(upper, plan.upper, rows, rules=rules),
        positions=rows.positions,
        segments=rows.segments,
        trunk=rows.trunk,
        rules=rules,
        adapters=adapters,
        ends=ends,
    )
    return hidden.states


def head_matrix(
    plan: Plan, params: PyTree, frozen: PyTree, *, rules: Rules | None = None
) -> Float[Array, "D V"]:
    """The matrix from states to logits of a language model, in compute layout.

    Gradients flow to it where it is trained (see the top of this file).
    """
    base = frozen.get("policy", {})
    name = "embed" if plan.cfg.tied else "head"
    # Trained, or below the cut, or frozen above it.
    places = (params.get("model", {}), params, base.get("lower", {}), base.get("upper", {}))
    holder = next(place for place in places if name in place)
    specs = decoder.specs(plan.cfg)[name]
    return decoder.head_matrix({name: sp.gather(holder[name], specs, rules)}, plan.cfg)
