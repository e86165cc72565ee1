"""Preference pairs as conversations to imitate: what was chosen is learnt, the rest is left out."""

from jaxreward.data import formats, sources


def completions(rows):
    """Brings preference pairs into the form of `conversations.read`.

    Args:
      rows: (number, dict or Bad), as `formats.rows` yields them; pairs as `sources.read_pairs`
        takes them. `rejected` may be missing.

    Returns:
      Iterator of the same, with fields id, prompt and completion.
    """
    return formats.mapped(rows, _completion)


def _completion(row):
    prompt, (chosen,) = sources.parted(row, ["chosen"])
    return {"id": row.get("id"), "prompt": prompt, "completion": chosen}
