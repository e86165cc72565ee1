"""Which part of a model is trained: everything, LoRA adapters, the top layers, or the head alone.

The optimizer sees `params`; what stays as it was is `frozen`, a separate argument of the step.
Layers below the first trained one can run once for the whole data set (`features`), since their
output never changes; the upper part then starts from `rows.features`.

    train="all"    params {model, score}      frozen {}
    train="top"    params {model, score}      frozen {policy: {lower}}          model = upper layers
    train="lora"   params {adapters, score}   frozen {policy: {lower?, upper}}
    train="head"   params {score}             frozen {policy: {lower, upper}}   upper = final norm
"""

import dataclasses
from typing import Any

import jax
from jaxtyping import Float

from jaxreward.core.types import Array, Rows
from jaxreward.models import decoder, heads, lora
from jaxreward.parallel import specs as sp
from jaxreward.parallel.rules import Rules

PyTree = Any
MODES = ("all", "lora", "top", "head")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A model, and what of it is trained. Hashable.

    Attributes:
      cfg: The whole model.
      train: "all", "lora", "top" or "head".
      top_layers: Upper layers that are trained ("top") or adapted ("lora"; 0 = every layer).
      lora: Rank, scale and targets, for "lora".
      scores: Numbers per answer of the scalar head.
    """

    cfg: decoder.Config
    train: str = "all"
    top_layers: int = 0
    lora: "lora.Config | None" = None
    scores: int = 1

    def __post_init__(self):
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


def make_plan(cfg: decoder.Config, role: Any, *, name: str = "policy") -> Plan:
    """The plan that one entry of a config's `models` asks for.

    Args:
      cfg: The model.
      role: Has `family`, `head`, `train`, `top_layers`, `lora_rank`, `lora_alpha`, `lora_targets`.
      name: Of the entry, for messages.

    Raises:
      ValueError: naming the field that does not fit.
    """
    if role.family != "decoder" or role.head != "scalar":
        raise ValueError(
            f"models.{name}: a reward model needs family='decoder' and head='scalar'; received "
            f"family={role.family!r}, head={role.head!r}"
        )
    adapters = None
    if role.train == "lora":
        adapters = lora.Config(role.lora_rank, float(role.lora_alpha), role.lora_targets)
    return Plan(cfg, role.train, role.top_layers, adapters)


def _upper_specs(plan):
    tree = decoder.specs(plan.upper)
    # A reward needs states, not logits: an untied language head is dropped, here and on export.
    return {k: v for k, v in tree.items() if k != "head"}


def param_specs(plan: Plan) -> PyTree:
    """Leaves that the optimizer updates."""
    tree = {"score": heads.scalar_specs(plan.cfg.width, scores=plan.scores)}
    if plan.train in ("all", "top"):
        tree["model"] = _upper_specs(plan)
    if plan.train == "lora":
        tree["adapters"] = lora.specs(_upper_specs(plan), plan.lora)
    return tree


def split(plan: Plan, weights: PyTree) -> tuple[PyTree, PyTree]:
    """The weights of a whole decoder as (initial trained part, frozen part).

    The trained part holds "model" only; `init` adds new adapters and the head.
    """
    upper = {k: v for k, v in weights.items() if k != "head"}
    frozen = {}
    if plan.cut:
        lower, upper = decoder.split_params(upper, plan.cut)
        frozen["lower"] = lower
    trained = {}
    if plan.train in ("all", "top"):
        trained["model"] = upper
    else:
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
      score: Head of an imported reward model to go on from, or None for a new one.
      rules: Mesh and layouts.

    Raises:
      ValueError: if the imported head has another number of scores.
    """
    params, frozen = split(plan, weights)
    described = param_specs(plan)
    if score is not None:
        sp.check({"score": score}, {"score": described["score"]}, what="the imported score head")
    new = {k: v for k, v in described.items() if k not in params}
    if score is not None:
        del new["score"]
        params["score"] = score
    if new:
        params.update(sp.init(new, key, rules=rules))
    return params, frozen


def join(plan: Plan, params: PyTree, frozen: PyTree) -> tuple[PyTree, PyTree]:
    """(whole decoder without language head, score head): adapters merged, parts put together."""
    base = frozen.get("policy", {})
    upper = params["model"] if "model" in params else base["upper"]
    if plan.train == "lora":
        scale = plan.lora.alpha / plan.lora.rank
        upper = lora.merge(upper, params["adapters"], scale)
    whole = decoder.join_params(base["lower"], upper) if plan.cut else upper
    return whole, params["score"]


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
    plan: Plan, params: PyTree, frozen: PyTree, rows: Rows, *, rules: Rules | None = None
) -> Float[Array, "B T D"]:
    """Final hidden states, from cached features when the rows carry them.

    Gradients flow to `params` only.
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
    )
    return hidden.states
