"""FLOPs and memory of the policy gradient at the shape at which peers are measured, and how often
rounds of online RL compile.

Llama, 4 layers, width 256, MLP 1024, 8 heads on 4 key heads of 32, vocabulary 32000, float32; one
prompt of 384 tokens with 8 answers of 128.
"""

import jax
import numpy as np
import pytest

from jaxreward import presets
from jaxreward.core.types import RolloutRows, Trajectory
from jaxreward.data import rollouts
from jaxreward.models import attention, decoder, trainable
from jaxreward.parallel import specs as sp
from jaxreward.recipes import online_rl
from jaxreward.train import plan, step

CFG = decoder.Config(
    vocab=32000, width=256, depth=4, heads=8, kv_heads=4, head_dim=32, mlp=1024, norm_eps=1e-5
)
PROMPT, ANSWERS, LENGTH = 384, 8, 128
MIB = 2**20


def forward_flops(tokens, pairs, scored):
    """Matrix-product FLOPs of one forward pass.

    Args:
      tokens: That run through the layers. pairs: Of a query and a key that it meets, a head.
      scored: States that meet the language head.
    """
    D, H, F = CFG.width, CFG.head_dim, CFG.mlp
    projections = D * H * (2 * CFG.heads + 2 * CFG.kv_heads) + 3 * D * F
    layers = projections * tokens + 2 * pairs * CFG.heads * H
    return 2 * (CFG.depth * layers + scored * D * CFG.vocab)


@pytest.fixture(scope="module")
def batch():
    """The one row of the group, as online_rl makes it."""
    one = Trajectory(
        prompt=np.arange(PROMPT, dtype=np.int32),
        tokens=np.arange(LENGTH, dtype=np.int32),
        logps=np.zeros(LENGTH, np.float32),
        written=np.ones(LENGTH, bool),
        version=np.zeros(LENGTH, np.int32),
        finished=True,
    )
    length = rollouts.row_len(max_prompt=PROMPT, max_new=LENGTH, answers=ANSWERS)
    assert length == PROMPT + ANSWERS * LENGTH
    (made,), efficiency = rollouts.minibatches(
        [[one] * ANSWERS], count=1, row_len=length, answers_per_row=2 * ANSWERS, multiple=1
    )
    assert efficiency == 1
    kept = {k: v for k, v in made.items() if k not in ("member", "index", "version")}
    zeros = np.zeros(made["answer"].shape, np.float32)
    return RolloutRows(**kept, advantages=zeros, weight=zeros, old_logps=zeros).validate()


@pytest.fixture(scope="module")
def program(batch):
    config = presets.load("online_rl/math")
    assert config.train.compute == "float32"
    made = trainable.make_plan(CFG, config.models.policy, language=True)
    gradient = step.make_gradient(*online_rl.make_loss(made, config))
    params = sp.abstract(trainable.param_specs(made))
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.jit(gradient).trace(params, {}, jax.eval_shape(lambda: batch), key, {})


def skipped_flops(batch):
    """Of the products that a static count holds, those in tiles of attention that see nothing.

    A tile of the forward pass is 2 products, one of the backward pass 5.
    """
    see = attention.sight(batch.segments, batch.trunk)
    (n, _), (queries, keys) = see.tiles.shape, see.sizes
    empty = n * (n + 1) // 2 - int(see.tiles.sum())
    return (2 + 5) * CFG.depth * empty * 2 * queries * keys * CFG.heads * CFG.head_dim


def test_policy_gradient(batch, program):
    """Catches logits of prompt tokens, a prompt that is run once an answer, all logits at once, and
    whatever else than the scored logits is made twice."""
    tokens, scored = PROMPT + ANSWERS * LENGTH, ANSWERS * LENGTH
    again = 2 * scored * CFG.width * CFG.vocab
    # As test_gates.py: every token of the row with every other.
    square = 3 * forward_flops(tokens, tokens**2, scored) + again
    # Each answer with the prompt and itself; full squares within these.
    pairs = PROMPT**2 + ANSWERS * LENGTH * (PROMPT + LENGTH)
    shared = 3 * forward_flops(tokens, pairs, scored) + again
    counted = plan.flops(program)
    assert counted <= 1.05 * square
    # The count is static and takes every tile below the diagonal for full.
    assert counted - skipped_flops(batch) <= 1.05 * shared
    assert plan.memory(program.lower().compile()).temporaries <= 700 * MIB


def test_what_is_skipped_is_what_runs_as_a_branch(batch, program):
    """Catches a count of skipped tiles that is not of this program."""
    see = attention.sight(batch.segments, batch.trunk)
    n = len(see.tiles)
    assert n == 11 and int(see.tiles.sum()) == 6 + 8 * (3 + 1)
    scored = batch.answer.shape[1]
    # All of the program: layers and head three times, logits once more, tiles 2 + 5 products.
    tokens = PROMPT + ANSWERS * LENGTH
    rest = 3 * forward_flops(tokens, 0, scored) + 2 * scored * CFG.width * CFG.vocab
    tiles = skipped_flops(batch) / (n * (n + 1) // 2 - int(see.tiles.sum())) * (n * (n + 1) // 2)
    assert plan.flops(program) == pytest.approx(rest + tiles, rel=1e-3)


class Canned:
    """A source of answers whose longest is as given, round by round."""

    utilisation = 1.0

    def __init__(self, longest):
        self.longest, self.asked = list(longest), []

    def publish(self, params, version):
        pass

    def submit(self, prompts, answers, key):
        self.asked.append((prompts, answers))

    def collect(self):
        prompts, answers = self.asked.pop(0)
        most = self.longest.pop(0)

        def one(prompt, i):
            n = most if i else 1
            tokens = np.arange(n, dtype=np.int32) + 5
            zeros = np.zeros(n, np.float32)
            ones, none = np.ones(n, bool), np.zeros(n, np.int32)
            return Trajectory(np.asarray(prompt, np.int32), tokens, zeros, ones, none, True)

        return [[one(prompt, i) for i in range(answers)] for prompt in prompts]


@pytest.mark.slow
def test_rounds_compile_one_program_a_shape(tiny_folder, tmp_path):
    """Catches a program a round: lengths that reach a shape, a dtype or a static argument."""
    config = presets.load(
        "online_rl/math:smoke",
        [
            f"models.policy.init=hf:{tiny_folder}",
            "data.batch=4",
            "rollouts.max_new=32",
            "rollouts.filter=none",
            "rollouts.workers=0",
            "rollouts.outcome=vowels/some",
        ],
    )
    config.unlock()
    config.rewards = dict(vowels=dict(fn="jaxreward.testing:vowels", weights=dict(share=1.0)))
    with plan.compilations() as sampled:
        built = online_rl.build(config.lock(), tmp_path)
        steps(built, built.batches, built.state, 2)
    # Prompts of several lengths, and answers that end where they do.
    assert sampled["jit(sample)"] == 1 and sampled["jit(step)"] <= 2
    rounds = built.batches
    rounds._engine = Canned([4, 32, 16, 4, 32, 16])
    built = online_rl.build(config, tmp_path)
    with plan.compilations() as first:
        state, shapes = steps(built, rounds, built.state, 4)
    # The scored tokens of a row are rounded up to eighths of it, rows to powers of two.
    assert 1 < len(shapes) <= 3 and first["jit(step)"] == len(shapes)
    with plan.compilations() as later:
        _, again = steps(built, rounds, state, 2)
    assert again <= shapes and not later


def steps(built, rounds, state, count):
    """(state after that many updates, the shapes that they had)."""
    shapes = set()
    for _ in range(count):
        rounds.before(state)
        batch = built.to_device(next(rounds))
        shapes.add((batch.tokens.shape, batch.answer.shape))
        state, _ = built.step(state, built.frozen, batch)
    return state, shapes
