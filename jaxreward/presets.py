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

Those of online_rl have rollouts, rewards and advantages beside.
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


def decoder(
    head,
    *,
    train="top",
    top_layers=6,
    outputs=None,
    output_weights=(),
    head_hidden=0,
    head_dropout=0.0,
    value=None,
):
    """One entry of `models`: a decoder and its head.

    Args:
      head: "lm", a language model; "scalar", a reward; "scores", a number for each of `outputs`;
        "classes", one of `outputs`.
      train: "all", "lora", "top" (the last `top_layers` and the head) or "head".
      top_layers: Upper layers that are trained ("top") or adapted ("lora"; 0 = every layer).
      outputs, output_weights: Names of a head's numbers, and what each weighs in the reward; ()
        takes the default of the head (`models.heads.reward`).
      head_hidden, head_dropout: Width of a hidden layer of a reward's head (0: linear), and the
        share of its inputs that training drops.
      value: Whether a policy ("lm") has a value head beside its own; None where no recipe asks.
    """
    model = {
        "family": "decoder",
        "init": "hf:models/smollm2",
        "head": head,
        "train": train,
        "top_layers": top_layers,
        "lora_rank": 0,
        "lora_alpha": 16.0,
        "lora_targets": ".*/(q|k|v|o|gate|up|down)/kernel",
    }
    if head != "lm":
        model |= {"head_hidden": head_hidden, "head_dropout": float(head_dropout)}
    if value is not None:
        model["value"] = value
    if outputs is not None:
        model |= {"outputs": tuple(outputs), "output_weights": tuple(output_weights)}
    return model


def rows(**changes):
    """The section `data` of recipes that read a file and pack it.

    `path` and `eval_path` are files (without the second, `eval_fraction` of the prompts is held
    out); `corpus` names a function of `data.corpora` that makes our rows of others, with keywords
    behind the name, such as "helpsteer3.pairs" or "pku_saferlhf.pairs,which=safer"; `template` is
    auto, chat or plain; `max_len` counts the tokens of a prompt with one answer; `row_len` 0 is
    chosen from the data; `batch` and `eval_batch` count rows, each of which packs several texts;
    `on_bad` is error or skip.
    """
    return {
        "path": "",
        "corpus": "",
        "eval_path": "",
        "template": "auto",
        "max_len": 1024,
        "row_len": 0,
        "batch": 8,
        "eval_fraction": 0.05,
        "eval_batch": 8,
        "on_bad": "error",
        **changes,
    }


def prompts(**changes):
    """The section `data` of recipes that sample: as `rows`, but `max_len` counts the tokens of a
    prompt alone, `row_len` 0 takes a prompt with as many answers as fit, and an update runs
    `batch` rows at a time, as often as its answers need."""
    section = rows(max_len=512)
    del section["eval_batch"]
    return {**section, **changes}


def rollouts(
    *,
    prompts,
    answers,
    max_new,
    outcome,
    updates=1,
    epochs=1,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    slots=0,
    cache="",
    reduction="token",
    filter="none",
    mask_truncated=False,
    overlong=0,
    whiten=False,
    importance="none",
    importance_cap=2.0,
    reward_kl=0.0,
    workers=2,
    timeout=10.0,
    offsets=False,
    show=2,
    ahead=0,
    devices=0,
    replay=0,
    replay_path="",
):
    """How the answers of a round are sampled, graded and used.

    Args:
      prompts, answers: Of a round, and to each prompt. max_new: Most tokens of an answer.
      outcome: The part of a reward that says whether an answer is right, "<reward>/<part>".
      updates: Minibatches of a round, a divisor of `prompts`. epochs: Times each is used.
      temperature, top_k, top_p, min_p: Of sampling; the losses use the temperature, too.
      slots: Answers decoded side by side; 0 = all. cache: Dtype of keys and values, "" = compute.
      reduction: "token", "sequence", "sequence_sum", "fixed" (over `max_new`) or "group", as
        `objectives.policy.reduction`.
      filter: Which groups count: "none" (all), "outcome" (outcomes differ) or "shaped" (something
        is right, and rewards differ).
      mask_truncated: Leave out answers that were cut off at `max_new`.
      overlong: Last tokens before `max_new` over which rewards fall by 1; 0 = none.
      whiten: Advantages over all tokens of the round.
      importance, importance_cap: `objectives.policy.importance_weights` between sampler and
        trainer: "none", "token", "sequence" or "mean".
      reward_kl: Coefficient of the divergence from the initial policy in the rewards.
      workers, timeout: Processes of the rewards (0 = none, in this one), seconds for one call.
      offsets: Tell rewards the characters of each token.
      show: Prompts a round whose answers are written to answers/.
      ahead: 1 samples a round from the weights before the last round's updates, so that sampling
        and updates can overlap. devices: The last devices, that only sample; 0 = all do both.
      replay, replay_path: New prompts to one older prompt, and the file of those; 0 = none.
    """
    return {
        "prompts": prompts,
        "answers": answers,
        "max_new": max_new,
        "outcome": outcome,
        "updates": updates,
        "epochs": epochs,
        "temperature": float(temperature),
        "top_k": top_k,
        "top_p": float(top_p),
        "min_p": float(min_p),
        "slots": slots,
        "cache": cache,
        "reduction": reduction,
        "filter": filter,
        "mask_truncated": mask_truncated,
        "overlong": overlong,
        "whiten": whiten,
        "importance": importance,
        "importance_cap": float(importance_cap),
        "reward_kl": float(reward_kl),
        "workers": workers,
        "timeout": float(timeout),
        "offsets": offsets,
        "show": show,
        "ahead": ahead,
        "devices": devices,
        "replay": replay,
        "replay_path": replay_path,
    }


def mesh(*, data=-1, fsdp=1, context=1, expert=1, tensor=1):
    """The device mesh, axis by axis; -1 takes the devices that are left (plain data parallel)."""
    return {"data": data, "fsdp": fsdp, "context": context, "expert": expert, "tensor": tensor}


def adamw(
    *,
    lr,
    schedule="cosine",
    warmup=0.03,
    clip=1.0,
    b1=0.9,
    b2=0.999,
    decay=0.01,
    decay_mask=".*/kernel",
    freeze="",
    groups=None,
):
    """AdamW. `warmup` is a fraction of the steps; decay acts on the paths `decay_mask` matches.

    `freeze` is a regular expression: parameters whose whole path matches are not trained. `groups`
    multiplies learning rates: {"head": {"match": "score/.*", "lr": 10.0}}.

    The numbers are made floats here, since an override is parsed by the type of the field and
    `lr=1` would turn 1e-3 away.
    """
    return {
        "name": "adamw",
        "lr": float(lr),
        "schedule": schedule,
        "warmup": float(warmup),
        "clip": float(clip),
        "b1": float(b1),
        "b2": float(b2),
        "decay": float(decay),
        "decay_mask": decay_mask,
        "freeze": freeze,
        "groups": groups or {},
    }


def train(
    *,
    steps=0,
    epochs=1,
    microbatches=1,
    log_every=10,
    save_every=200,
    eval_every=200,
    keep=2,
    compute="float32",
    remat="cheap",
    ema=0.0,
    max_skipped=3,
    tensorboard=False,
    wandb="",
    profile_from=0,
    profile_steps=0,
):
    """The training loop. `steps` above 0 wins over `epochs`; `keep` counts checkpoints.

    `remat` is "cheap", "full" or "none" (see `models.decoder.Config`). With `ema` above 0 a moving
    average of the parameters, of that decay, is evaluated, scored with and exported. A step with a
    number that is not finite is skipped; `max_skipped` of them in a row end the run.

    `tensorboard` also writes event files, `wandb` names a project of Weights & Biases ("" for
    none), and `profile_steps` steps from `profile_from` on are traced (see `train.tracking`).
    """
    return {
        "steps": steps,
        "epochs": epochs,
        "microbatches": microbatches,
        "log_every": log_every,
        "save_every": save_every,
        "eval_every": eval_every,
        "keep": keep,
        "compute": compute,
        "remat": remat,
        "ema": ema,
        "max_skipped": max_skipped,
        "tensorboard": tensorboard,
        "wandb": wandb,
        "profile_from": profile_from,
        "profile_steps": profile_steps,
    }


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
    },
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
    sections = [name for name in ("data", "train", "rollouts") if name in config]
    targets += [(section, config[section], _SMOKE[section]) for section in sections]
    for where, section, small in targets:
        for key, value in small.items():
            if key not in section:
                continue
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
