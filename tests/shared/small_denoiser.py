"""A denoiser whose weights are written by hand, so that what it predicts is known exactly, and a
reward for toys."""

import jax.numpy as jnp
import numpy as np

from jaxreward.models import decoder
from jaxreward.parallel import specs as sp
from jaxreward.testing import tiny_config

A, B, MASK, PROMPT = 0, 1, 2, 3


def count_digits(prompt, answer, record):
    """A reward that needs no reference: digits in the answer."""
    digits = sum(c.isdigit() for c in answer)
    return {"accuracy": float(digits > 0), "reward": float(digits)}


def pair_model(sharpness=40.0):
    """(params, cfg) of a denoiser of "aa" or "bb": a masked position is "a" or "b" with equal
    chances while its partner is masked, and as its partner once that is there.

    Tokens 0 and 1 are a and b, 2 is the mask, 3 a prompt of one token. Coordinate 0 of a state says
    a (+) or b (-); one layer of attention, which looks at all positions alike, adds the mean of
    these over the text. Coordinate 1 keeps the norm from blowing up what is nearly 0.
    """
    cfg = tiny_config(
        vocab=4,
        width=4,
        depth=1,
        heads=1,
        kv_heads=1,
        head_dim=4,
        mlp=4,
        tied=False,
        mask="full",
        mask_id=MASK,
        predict_offset=0,
    )
    flat = {
        path: np.ones(p.shape, np.float32) if p.init == "ones" else np.zeros(p.shape, np.float32)
        for path, p in _leaves(decoder.specs(cfg))
    }
    flat["embed", "table"][:, 1] = 1.0
    flat["embed", "table"][A, 0], flat["embed", "table"][B, 0] = 1.0, -1.0
    flat["layers", "attn", "v", "kernel"][0, 0, 0, 0] = 1.0
    flat["layers", "attn", "o", "kernel"][0, 0, 0, 0] = 3.0
    flat["head", "kernel"][0, A], flat["head", "kernel"][0, B] = sharpness, -sharpness
    flat["head", "kernel"][1, MASK] = flat["head", "kernel"][1, PROMPT] = -sharpness
    tree = {}
    for path, x in flat.items():
        *above, name = path
        place = tree
        for part in above:
            place = place.setdefault(part, {})
        place[name] = jnp.asarray(x)
    return tree, cfg


def _leaves(tree, path=()):
    for name, value in tree.items():
        if isinstance(value, sp.Param):
            yield (*path, name), value
        else:
            yield from _leaves(value, (*path, name))
