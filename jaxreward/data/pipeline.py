"""Trees to packed rows to batches, in NumPy.

A row of `row_len` slots holds several trees. A tree's prompt is one segment; each of its answers
is a segment of its own whose `trunk` is the prompt's segment, and whose positions go on after the
prompt. So the prompt is computed once, and an answer sees its prompt and itself, nothing else.

What is packed with what is decided once, from the seed. Each epoch shuffles the rows anew.
"""

import math

import numpy as np

WINDOW = 1024


def suggest_row_len(lengths, *, multiple=64):
    """The smallest multiple of `multiple` that holds the longest tree.

    Args:
      lengths: Sizes of the trees (`Tree.size`), at least one.
      multiple: Row lengths are multiples of this, as accelerators like it.

    Returns:
      int.

    Raises:
      ValueError: without lengths.
    """
    lengths = list(lengths)
    if not lengths:
        raise ValueError("suggest_row_len needs the length of at least one tree; received none")
    return multiple * math.ceil(max(max(lengths), 1) / multiple)


def pack(
    trees,
    *,
    row_len,
    answers_per_row=None,
    pairs_per_row=None,
    costs=None,
    order=None,
    window=WINDOW,
):
    """Packs trees into rows: first-fit decreasing within windows, deterministic.

    Args:
      trees: list of Tree.
      row_len: Slots of a row.
      answers_per_row: Most answers in a row, K; None for no limit.
      pairs_per_row: Most pairs in a row, N; None for no limit.
      costs: What else a row has limited room for: {name: (need of each tree, room of a row)},
        such as {"patches": ([256, 0, ...], 1024)}.
      order: Order in which trees enter the windows, a permutation; None takes them as they come.
      window: Trees sorted and packed together. Larger packs tighter and mixes lengths less.

    Returns:
      list of rows, each a list of indices into trees; every tree is in exactly one.

    Raises:
      ValueError: naming a tree that fits into no row, and the remedy.
    """
    most_answers = math.inf if answers_per_row is None else answers_per_row
    most_pairs = math.inf if pairs_per_row is None else pairs_per_row
    axes = {
        "slots": ([tree.size for tree in trees], row_len, "raise row_len or lower max_len"),
        "answers": ([len(t.answers) for t in trees], most_answers, "raise answers_per_row"),
        "pairs": ([len(tree.pairs) for tree in trees], most_pairs, "raise pairs_per_row"),
    }
    for name, (need, room) in (costs or {}).items():
        if len(need) != len(trees):
            raise ValueError(f"costs[{name!r}] names {len(need)} trees; there are {len(trees)}")
        axes[name] = need, room, f"raise the room for {name}"
    for what, (needs, room, remedy) in axes.items():
        for tree, need in zip(trees, needs):
            if need > room:
                raise ValueError(
                    f"tree {tree.id!r} needs {need} {what} and a row has {room}; {remedy}"
                )
    rooms = [room for _, room, _ in axes.values()]
    vectors = list(zip(*(needs for needs, _, _ in axes.values())))
    order = range(len(trees)) if order is None else [int(i) for i in order]
    plan = []
    for begin in range(0, len(order), window):
        opened = []  # (what is left of each axis, members)
        for i in sorted(order[begin : begin + window], key=lambda i: -trees[i].size):
            fits = lambda row: all(a >= n for a, n in zip(row[0], vectors[i]))
            row = next(filter(fits, opened), None)
            if row is None:
                row = (list(rooms), [])
                opened.append(row)
            for axis, n in enumerate(vectors[i]):
                row[0][axis] -= n
            row[1].append(i)
        plan += [members for _, members in opened]
    return plan


def efficiency(trees, plan, *, row_len):
    """Share of the slots of a plan that hold tokens.

    Args:
      trees: list of Tree.
      plan: From `pack`.
      row_len: Slots of a row.

    Returns:
      float in [0, 1]; 0 for an empty plan.
    """
    used = sum(trees[i].size for row in plan for i in row)
    return used / (len(plan) * row_len) if plan else 0.0


def widths(trees, plan):
    """The K and N that a plan needs.

    Args:
      trees: list of Tree.
      plan: From `pack`.

    Returns:
      (most answers in a row, most pairs in a row), each at least 1.
    """
    return (
        max([1, *(sum(len(trees[i].answers) for i in row) for row in plan)]),
        max([1, *(sum(len(trees[i].pairs) for i in row) for row in plan)]),
    )


def most_supervised(trees, plan, *, multiple=64):
    """The most supervised tokens of a row of a plan, rounded up: few sizes, hence few programs.

    Args:
      trees: list of Tree.
      plan: From `pack`.
      multiple: Of which the result is one.

    Returns:
      int.
    """
    counts = [sum(int(np.sum(loss)) for loss in tree.loss) for tree in trees]
    most = max([1, *(sum(counts[i] for i in row) for row in plan)])
    return multiple * math.ceil(most / multiple)


def carriers(trees):
    """The first tree that carries each of what trees may carry, for `materialise`.

    Args:
      trees: list of Tree.

    Returns:
      dict of features, ref_logps and targets: Tree, or None where no tree has any.
    """
    has = {
        "features": lambda tree: tree.features is not None,
        "ref_logps": lambda tree: tree.ref_logps is not None,
        "targets": lambda tree: bool(tree.targets),
    }
    return {name: next(filter(test, trees), None) for name, test in has.items()}


def materialise(trees, plan_row, *, row_len, answers_per_row, pairs_per_row, carry=None):
    """Lays the trees of one row out as arrays: the fields of `PairRows` without the batch axis.

    Slots: each tree's prompt, then its answers; padding at the end is zero throughout. Segments
    count from 1. A tree without prompt tokens has no prompt segment, and its answers have trunk 0.

    Args:
      trees: list of Tree.
      plan_row: Indices of the trees in this row, in order; empty gives an empty row.
      row_len: Slots, T.
      answers_per_row: K.
      pairs_per_row: N.
      carry: `carriers(trees)`, for who lays out many rows of the same trees; None looks anew.

    Returns:
      dict of tokens i32[T], mask bool[T], loss_mask bool[T], positions i32[T, 1], segments
      i32[T], trunk i32[T], ends i32[K] (-1 = none), pairs i32[N, 2] (-1 = none), margin f32[N],
      weight f32[N], scores f32[N, 2] (NaN = the pair has none), index i32[K, 2]: (tree, answer) of
      each answer, -1 = none; if the trees carry them, features [T, D] in their own dtype,
      targets f32[K, C] (NaN = not known) with answer_weight f32[K] (0 = no answer, or no targets),
      and ref_logps f32[K] (0 = no answer).

    Raises:
      ValueError: if the row does not fit, or only some of the trees carry features or ref_logps.
    """
    T, K, N = row_len, answers_per_row, pairs_per_row
    members = [trees[i] for i in plan_row]
    for what, need, room in (
        ("slots", sum(tree.size for tree in members), T),
        ("answers", sum(len(tree.answers) for tree in members), K),
        ("pairs", sum(len(tree.pairs) for tree in members), N),
    ):
        if need > room:
            raise ValueError(f"the row of trees {list(plan_row)} needs {need} {what}, not {room}")
    row = {
        "tokens": np.zeros(T, np.int32),
        "mask": np.zeros(T, np.bool_),
        "loss_mask": np.zeros(T, np.bool_),
        "positions": np.zeros((T, 1), np.int32),
        "segments": np.zeros(T, np.int32),
        "trunk": np.zeros(T, np.int32),
        "ends": np.full(K, -1, np.int32),
        "pairs": np.full((N, 2), -1, np.int32),
        "margin": np.zeros(N, np.float32),
        "weight": np.zeros(N, np.float32),
        "scores": np.zeros((N, 2), np.float32),
        "index": np.full((K, 2), -1, np.int32),
    }
    # Looked up over all trees, so that an empty row has features where the others have them.
    carry = carriers(trees) if carry is None else carry
    for name in ("features", "ref_logps"):
        carrier = carry[name]
        if carrier is None:
            continue
        without = [tree.id for tree in members if getattr(tree, name) is None]
        if without:
            raise ValueError(
                f"tree {without[0]!r} carries no {name} and tree {carrier.id!r} does; "
                "compute them for all trees or for none"
            )
        if name == "ref_logps":
            row[name] = np.zeros(K, np.float32)
        else:
            like = carrier.features[-1]
            row[name] = np.zeros((T, like.shape[-1]), like.dtype)
    if carry["targets"] is not None:
        outputs = len(carry["targets"].targets[0])
        row["targets"] = np.full((K, outputs), math.nan, np.float32)
        row["answer_weight"] = np.zeros(K, np.float32)
    slot = segment = answer = pair = 0

    def place(tokens, start, trunk, features):
        nonlocal slot, segment
        if len(tokens) == 0:
            return 0
        segment += 1
        span = slice(slot, slot + len(tokens))
        row["tokens"][span] = tokens
        row["mask"][span] = True
        row["positions"][span, 0] = np.arange(start, start + len(tokens))
        row["segments"][span] = segment
        row["trunk"][span] = trunk
        if features is not None:
            row["features"][span] = features
        slot = span.stop
        return segment

    for i, tree in zip(plan_row, members):
        features = tree.features or [None] * (1 + len(tree.answers))
        trunk = place(tree.prompt, 0, 0, features[0])
        first = answer
        for j, tokens in enumerate(tree.answers):
            begin = slot
            place(tokens, len(tree.prompt), trunk, features[1 + j])
            row["loss_mask"][begin:slot] = tree.loss[j]
            row["ends"][answer] = slot - 1
            row["index"][answer] = i, j
            if tree.targets:
                row["targets"][answer] = tree.targets[j]
                row["answer_weight"][answer] = tree.answer_weight[j]
            if tree.ref_logps is not None:
                row["ref_logps"][answer] = tree.ref_logps[j]
            answer += 1
        scored = tree.scores or [None] * len(tree.pairs)
        for (chosen, rejected), margin, weight, scores in zip(
            tree.pairs, tree.margin, tree.weight, scored, strict=True
        ):
            row["pairs"][pair] = first + chosen, first + rejected
            row["margin"][pair], row["weight"][pair] = margin, weight
            row["scores"][pair] = math.nan if scores is None else scores
            pair += 1
    return row


def steps_per_epoch(rows, *, batch, shards=1, drop_remainder=False):
    """Batches that one epoch of `batches` takes.

    Args:
      rows: Rows of the plan.
      batch: Rows a batch, for one shard.
      shards: Number of shards.
      drop_remainder: As given to `batches`.

    Returns:
      int, the same on all shards.
    """
    return rows // (batch * shards) if drop_remainder else math.ceil(rows / (batch * shards))


def batches(
    trees,
    *,
    row_len,
    batch,
    seed,
    shard=(0, 1),
    take=None,
    epochs=None,
    drop_remainder=False,
    answers_per_row=None,
    pairs_per_row=None,
    plan=None,
    shuffle=True,
):
    """Iterates over packed batches; the position can be saved and restored.

    All shards are given the same trees and the same seed. Rows are shuffled anew each epoch over
    all shards, cut into global batches of batch * shards rows, and shard s takes the s-th `batch`
    rows of each. So all shards take equally many steps, together they see every row once an
    epoch, and the global batches depend on batch * shards alone.

    Args:
      trees: list of Tree.
      row_len: Slots of a row, T.
      batch: Rows a batch on this shard, B.
      seed: Of packing and shuffling; 0 <= seed < 2**32.
      shard: (index of this shard, number of shards).
      take: The rows of a global batch that are laid out here; None takes the shard's. For
        processes whose devices hold rows that are no even share.
      epochs: How many; None never ends.
      drop_remainder: Leave the last short global batch out; otherwise empty rows (all zero,
        weight 0, ends -1) fill it up.
      answers_per_row: K; None takes what the plan needs.
      pairs_per_row: N; None takes what the plan needs.
      plan: From `pack`; None packs in an order drawn from the seed.
      shuffle: False keeps the plan's order, for evaluation.

    Returns:
      An iterator of dicts as from `materialise`, with a leading axis B. `get_state()` gives its
      position as a JSON-able dict, `set_state(state)` restores it, on an iterator made with the
      same arguments.

    Raises:
      ValueError: if there are no trees, or fewer rows than one batch with drop_remainder, or a
        tree fits into no row.
    """
    import grain

    index, shards = shard
    if not 0 <= index < shards:
        raise ValueError(f"shard must be (index, count) with 0 <= index < count; received {shard}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1 row; received {batch}")
    if not trees:
        raise ValueError("batches needs at least one tree; received none")
    if plan is None:
        order = np.random.default_rng(seed).permutation(len(trees)) if shuffle else None
        plan = pack(
            trees,
            row_len=row_len,
            answers_per_row=answers_per_row,
            pairs_per_row=pairs_per_row,
            order=order,
        )
    if not steps_per_epoch(len(plan), batch=batch, shards=shards, drop_remainder=drop_remainder):
        raise ValueError(
            f"{len(plan)} rows do not fill one global batch of {batch * shards}; lower batch, or "
            "set drop_remainder=False"
        )
    K, N = widths(trees, plan)
    K, N = answers_per_row or K, pairs_per_row or N
    take = range(index * batch, (index + 1) * batch) if take is None else [int(i) for i in take]
    shape = {"row_len": row_len, "answers_per_row": K, "pairs_per_row": N, "carry": carriers(trees)}

    def local(rows):
        rows = [rows[i] if i < len(rows) else [] for i in take]
        made = [materialise(trees, row, **shape) for row in rows]
        return {name: np.stack([row[name] for row in made]) for name in made[0]}

    dataset = grain.MapDataset.source(plan)
    if shuffle:
        dataset = dataset.shuffle(seed=seed)
    dataset = dataset.batch(batch * shards, drop_remainder=drop_remainder, batch_fn=list)
    dataset = dataset.map(local).repeat(epochs)
    # Laying out a batch takes less time than a step: no threads, hence nothing to shut down.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
