"""Values of a config from text, "section.key=value" read by the type of what stands there; and what
a resumed run may change.

`config_flags` reads the command line of the process even for a private FlagValues, and so cannot be
called from a notebook or a test; hence this.
"""

import ast
import math
import re
import shlex

from ml_collections import ConfigDict

from jaxreward.core.resolve import near

# What `presets.diff` shows where one of two configs has no such key.
ABSENT = "(absent)"
# Keys of a config that may differ from those of the run being resumed: they change when something
# is written or given up, not what is computed. train.steps may grow as well.
MAY_CHANGE = tuple(
    f"train.{key}"
    for key in (
        *("log_every", "save_every", "eval_every", "keep", "max_skipped"),
        *("tensorboard", "wandb", "profile_from", "profile_steps"),
    )
)
# What runs did before a key was there, where it is not nothing; and keys that are there no more.
_BEFORE = {"data.form": "pairs"}
_GONE = ("data.source",)


def override(config, key, text):
    """Sets one field of a config; mappings are changed in place.

    Args:
      config: An unlocked ConfigDict.
      key: "section.key", an item of a list as "section.key[0]".
      text: The value, read by the type of the field; a field that is None because of
        `config_dict.placeholder(type)` takes a value of that type, or "none".

    Raises:
      KeyError: if there is no such key; names near misses.
      ValueError: if the text is no value of the field's type.
    """
    _set(config, re.findall(r"\[-?\d+\]|[^.\[\]]+", key), text, "config")


def _set(node, path, text, where):
    """`node` with the item at `path` read from `text`; mappings are changed in place."""
    key, *rest = path
    if isinstance(node, ConfigDict | dict):
        if key not in node:
            known = sorted(node)
            raise KeyError(
                f"unknown key {where}.{key}{near(key, known)} "
                f"keys there: {', '.join(known) or 'none'}"
            )
        name, inner = key, f"{where}.{key}"
        kind = node.get_type(key) if isinstance(node, ConfigDict) else type(node[key])
    elif isinstance(node, list | tuple):
        name, inner = _index(node, key, where), f"{where}{key}"
        kind = type(node[name])
    else:
        raise KeyError(
            f"unknown key {where}.{key}; {where} is a single value, {node!r}, not a section"
        )
    value = _set(node[name], rest, text, inner) if rest else parse(text, node[name], kind, inner)
    if isinstance(node, list | tuple):
        return type(node)([*node[:name], value, *node[name + 1 :]])
    if value is not node[name]:
        node[name] = value
    return node


def _index(node, key, where):
    if not re.fullmatch(r"\[\d+\]", key) or int(key[1:-1]) >= len(node):
        raise KeyError(
            f"unknown item {key!r} of {where}; it is a {type(node).__name__} of {len(node)}: "
            f"write {where}[0] and so on, or the whole {type(node).__name__}"
        )
    return int(key[1:-1])


def parse(text, old, kind, where):
    """`text` as a value of type `kind`, to stand in the place of `old`.

    Args:
      text: What was written. old: The value that it replaces, for the types of a list's items.
      kind: bool, int, float, str, list or tuple. where: Name of the field, for messages.

    Raises:
      ValueError: if the text is no such value, or the field is a section.
    """
    if old is None and kind is type(None):
        raise ValueError(
            f"{where} is None and so has no type to read {text!r} by; "
            "declare it in the config file as config_dict.placeholder(type)"
        )
    if old is None and text.lower() == "none":
        return None
    if issubclass(kind, ConfigDict | dict):
        keys = ", ".join(sorted(old)) or "none"
        raise ValueError(f"{where} is a section; set one of its keys, got {text!r}; keys: {keys}")
    if kind not in _READERS:
        raise ValueError(
            f"{where} is a {kind.__name__}, which is not read from text such as {text!r}; "
            "set it in the config file"
        )
    value = _READERS[kind](text, old)
    if value is None:
        expected = _EXPECTED.get(kind, kind.__name__)
        raise ValueError(f"{where}: expected {expected}, got {text!r}")
    return value


def _read_bool(text, old):
    return {"true": True, "1": True, "false": False, "0": False}.get(text.strip().lower())


def _read_int(text, old):
    return int(text) if re.fullmatch(r"\s*[+-]?\d+(_\d+)*\s*", text) else None


def _read_float(text, old):
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _read_sequence(text, old):
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return None
    if not isinstance(value, list | tuple):
        return None
    # Items that are all of one plain type stay so: [1, 2] does not become ["a"].
    kinds = {type(item) for item in old or ()}
    if len(kinds) == 1 and (kind := kinds.pop()) in (bool, int, float, str):
        if kind is float:
            value = [float(item) if type(item) is int else item for item in value]
        if any(type(item) is not kind for item in value):
            return None
    return value


_READERS = {
    bool: _read_bool,
    int: _read_int,
    float: _read_float,
    str: lambda text, old: text,
    list: lambda text, old: _as(list, _read_sequence(text, old)),
    tuple: lambda text, old: _as(tuple, _read_sequence(text, old)),
}
_EXPECTED = {
    bool: "bool (true or false)",
    float: "float (a finite number)",
    list: "list like the present one, written as in Python: [1, 2]",
    tuple: "tuple like the present one, written as in Python: (1, 2)",
}


def _as(kind, value):
    return None if value is None else kind(value)


def spell(value):
    """`value` as one writes it after "=" in an override; `parse` reads it back as it was."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "none"
    return value if isinstance(value, str) else repr(value)


def check_resume(path, changed):
    """Refuses to go on with a run under another config than the one it was started with.

    Args:
      path: Where the config of the run is.
      changed: {key: (value there, value now)}, from `presets.diff`.

    Raises:
      ValueError: listing what has changed and may not, with the flags that put it back.
    """

    refused = {}
    for key, (old, new) in changed.items():
        # 0 steps means "by epochs", which is no number to compare with.
        counts = isinstance(old, int) and isinstance(new, int)
        longer = key == "train.steps" and counts and 0 < old < new
        # A key that is newer than the run, at the value that stands for how it was before; or one
        # that has gone since, and had one value only.
        neutral = old == ABSENT and (not new or new in ("none", _BEFORE.get(key)))
        # Stages are held to their own workdirs, those that have not started to nothing.
        may = key in (*MAY_CHANGE, *_GONE) or key.startswith("stages.")
        if not (may or longer or neutral):
            refused[key] = (old, new)
    if not refused:
        return
    lines = [
        f"  {key}: {spell(old)} there, {spell(new)} now" for key, (old, new) in refused.items()
    ]
    flags = [
        shlex.quote(f"--config.{key}={spell(old)}")
        for key, (old, new) in refused.items()
        if ABSENT not in (old, new)
    ]
    remedy = "use another --workdir"
    if flags:
        remedy += f", or the old values: {' '.join(flags)}"
    free = ", ".join(MAY_CHANGE)
    raise ValueError(
        f"{path} is of a run with another config:\n"
        + "\n".join(lines)
        + f"\n{remedy}\n(a resumed run may change {free}, and raise train.steps)"
    )
