"""Configs: their shared fragments, and the loader that finds, overrides, compares and saves them.

A config file is a Python file with `get_config(arg="")` that returns a `ConfigDict`:

    from jaxreward import presets

    def get_config(arg=""):
        c = presets.base(arg)
        c.recipe = "preference"
        ...
        return presets.smoke(c, arg)

Every shipped config has the sections seed, recipe, models, data, losses, optim, mesh, train and
evals, and accepts the word `smoke`: the same run at toy size.

Those of online_rl have rollouts, rewards and advantages beside; those of diffusion_rl also intra
and search; and noise has whatever trains a denoiser by imitation.
"""

import importlib.util
import inspect
import json
import math
import secrets
import traceback
from pathlib import Path

from ml_collections import ConfigDict

from jaxreward.core.resolve import near
from jaxreward.fragments import (  # noqa: F401 - configs know them as presets.decoder etc.
    adamw,
    decoder,
    denoised,
    denoiser,
    intra,
    mesh,
    noise,
    prompts,
    rollouts,
    rows,
    search,
    train,
)
from jaxreward.overrides import ABSENT, override, parse

# Fragments


def parse_arg(arg, **words):
    """The words of a config's argument, "smoke,foo=3", against those declared.

    Args:
      arg: Words separated by commas. A word declared with a bool is a switch and stands alone;
        any other takes a value, `word=value`, of the type of its default.
      **words: The declared words and their defaults. `smoke` is always among them.

    Returns:
      dict of every declared word, with its value or default.

    Raises:
      ValueError: An undeclared word, one given twice, or a value that does not fit.
    """
    words = {"smoke": False, **words}
    given = {}
    for part in filter(None, (p.strip() for p in arg.split(","))):
        word, equals, text = (p.strip() for p in part.partition("="))
        if word not in words:
            raise ValueError(
                f"unknown word {word!r} in the config's argument {arg!r}{near(word, list(words))}"
                f" words it knows: {', '.join(sorted(words))}"
            )
        if word in given:
            raise ValueError(f"{word!r} is given twice in the config's argument {arg!r}")
        switch = isinstance(words[word], bool)
        if switch == bool(equals):
            wanted = f"{word!r} alone" if switch else f"'{word}=VALUE'"
            raise ValueError(f"the config's argument {arg!r}: expected {wanted}, got {part!r}")
        given[word] = True if switch else parse(text, words[word], type(words[word]), word)
    return {**words, **given}


def base(arg="", **words):
    """A config with the fixed sections, to be filled: seed, mesh and the training loop have values.

    Args:
      arg: The argument of `get_config`; checked here, so that a misspelt word fails at once.
      **words: Words the config knows beside `smoke`, see `parse_arg`.
    """
    parse_arg(arg, **words)
    return ConfigDict(
        {
            "seed": 0,
            "recipe": "",
            "models": {},
            "data": {},
            "losses": {},
            "optim": {},
            "mesh": mesh(),
            "train": train(),
            "evals": {},
        }
    )


# What `smoke` puts in place, section by section. Nothing that decides what is computed is here:
# no loss, optimizer, recipe, head, LoRA target or evaluator.
_SMOKE = {
    "models": {"init": "tiny", "top_layers": 1},
    "data": {
        "path": "synthetic",
        "eval_path": "",
        "max_len": 64,
        "row_len": 0,
        "batch": 8,
        "eval_batch": 8,
    },
    "rollouts": {
        "prompts": 4,
        "answers": 2,
        "max_new": 8,
        "updates": 1,
        "slots": 0,
        "overlong": 0,
        "steps": 4,
        "every": 2,
        "block": 4,
    },
    "search": {"every": 2},
    "train": {"steps": 4, "microbatches": 1, "log_every": 1, "save_every": 2, "eval_every": 2},
}


def smoke(config, arg="smoke"):
    """`config` at toy size where `arg` has the word smoke; otherwise `config` as it is.

    The toy is a random model (`init="tiny"`), a generated data set (`path="synthetic"`) and a few
    steps. Only sizes, steps and data paths change, and only keys the config has.

    Raises:
      ValueError: A toy-size key of the config has another type than its toy value.
    """
    if "smoke" not in (word.strip() for word in arg.split(",")):
        return config
    targets = [(f"models.{name}", model, _SMOKE["models"]) for name, model in config.models.items()]
    sections = [name for name in ("data", "train", "rollouts", "search") if name in config]
    targets += [(section, config[section], _SMOKE[section]) for section in sections]
    for where, section, small in targets:
        for key, value in small.items():
            if key not in section or (key == "block" and not section[key]):
                continue  # without blocks there are none at toy size
            if key == "steps" and not section.get("epochs", 1) and not section[key]:
                continue  # what trains nothing trains nothing at toy size
            if section.get_type(key) is not type(value):
                raise ValueError(
                    f"config.{where}.{key}: smoke expects {type(value).__name__}, "
                    f"the config has {section[key]!r}"
                )
            section[key] = value
    return config


# The loader


def shipped():
    """The configs that come with the package: {"reward_model/bradley_terry": path, ...}.

    They lie in jaxreward/_configs in an installed wheel and in configs/ of a source checkout.
    """
    package = Path(__file__).resolve().parent
    folder = package / "_configs"
    # pyproject.toml: a folder called configs beside an installed package is somebody else's.
    if not folder.is_dir() and (package.parent / "pyproject.toml").is_file():
        folder = package.parent / "configs"
    files = {path.relative_to(folder): path for path in sorted(folder.rglob("*.py"))}
    return {
        relative.with_suffix("").as_posix(): path
        for relative, path in files.items()
        if not path.name.startswith("_")
    }


def load(name, overrides=()):
    """The config called `name`, with `overrides` applied, locked.

    Args:
      name: The path of a .py file, or the name of a shipped config such as
        "reward_model/bradley_terry"; ":" and words for the config may follow (":smoke").
      overrides: Strings "section.key=value", applied in order. A value is read by the type of the
        field it replaces; an item of a list is reached as "section.key[0]", and a field that is
        None because of `config_dict.placeholder(type)` takes a value of that type, or "none".

    Returns:
      A locked ConfigDict: values can be set, keys cannot be added.

    Raises:
      FileNotFoundError: No such file or shipped config; the text lists the shipped ones.
      KeyError: An override names a key that does not exist.
      ValueError: The file has no usable `get_config`, does not know the words after ":", or an
        override has a value of the wrong type.
    """
    # From 2 on: the ":" of a Windows drive is at 1.
    split = name.find(":", 2)
    place, arg = (name, "") if split < 0 else (name[:split], name[split + 1 :])
    config = _from_file(_find(place), arg)
    config.unlock()
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f"override {text!r}: expected 'section.key=value'")
        override(config, key, value)
    return config.lock()


def _find(place):
    known = shipped()
    if place.endswith(".py"):
        if Path(place).is_file():
            return Path(place)
    elif place in known:
        return known[place]
    raise FileNotFoundError(
        f"no config {place!r}{near(place.removesuffix('.py'), list(known))} "
        "give the path of a .py file that exists, or a shipped name: "
        f"{', '.join(known) or 'none found'}"
    )


def _from_file(path, arg):
    spec = importlib.util.spec_from_file_location(f"jaxreward_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        # Not exec_module: cached bytecode hides an edit made within the same second, and a config
        # is what one edits between two runs.
        exec(spec.loader.source_to_code(path.read_bytes(), str(path)), vars(module))
        if not callable(getattr(module, "get_config", None)):
            raise ValueError(f"{path} has no get_config(arg=''); a config file must define it")
        takes_arg = bool(inspect.signature(module.get_config).parameters)
        if arg and not takes_arg:
            raise ValueError(f"{path}: get_config takes no argument, so ':{arg}' cannot be used")
        config = module.get_config(arg) if takes_arg else module.get_config()
    except ValueError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f":{frame.lineno}" for frame in frames if frame.filename == str(path)]
        where = f"{path}{lines[-1] if lines else ''}"
        raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"{path}: get_config returned {type(config).__name__}, expected a "
            "ml_collections.ConfigDict; start it with presets.base(arg)"
        )
    return config


# Compare and save


def to_dict(config):
    """`config` as plain dicts, lists, strings, numbers and None: what JSON gives back.

    Raises:
      ValueError: A value is of another kind, or a number is not finite; the text names its key.
    """
    return _plain(config, "config")


def _plain(value, where):
    if isinstance(value, ConfigDict | dict):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}; a config holds finite numbers")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"{where}: {value!r} is a {type(value).__name__}; a config holds plain values (numbers, "
        "strings, lists, sections), and functions are named by their dotted path"
    )


def diff(old, new):
    """Where two configs differ: {"optim.lr": (0.0001, 0.001), ...}, keys sorted.

    Lists are compared whole, a tuple equals the list that JSON makes of it, and a key that only
    one of them has shows as `ABSENT` in the other.
    """
    old, new = _flat(to_dict(old)), _flat(to_dict(new))
    pairs = {
        key: (old.get(key, ABSENT), new.get(key, ABSENT)) for key in sorted(old.keys() | new.keys())
    }
    # A bool is an int to Python, but true in place of 1 is a change worth showing.
    return {
        key: (a, b)
        for key, (a, b) in pairs.items()
        if a != b or isinstance(a, bool) != isinstance(b, bool)
    }


def _flat(tree, prefix=""):
    out = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def dumps(config):
    """`config` as JSON text: sorted keys, two spaces, the same bytes for the same config."""
    return json.dumps(to_dict(config), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def save(config, path):
    """Writes `config` as JSON. The file appears whole or not at all."""
    path = Path(path)
    text = dumps(config)
    # A name of its own: the processes of several hosts may write the same file at once.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path):
    """The config that `save` wrote, locked. Types of placeholders are not kept: None is None.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: The file does not hold a config.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no config at {path}; a run writes it into its workdir")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not the JSON of a config: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(tree).__name__}")
    return ConfigDict(tree).lock()
