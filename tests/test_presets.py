"""The config fragments and the loader: words, overrides, comparison, files."""

import json
import math
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict, config_dict

from jaxreward import overrides, presets

CONFIG = """
from ml_collections import ConfigDict, config_dict

def get_config(arg=""):
    return ConfigDict(dict(
        seed=0,
        model=dict(width=32, depth=2, rank=config_dict.placeholder(int), bare=None,
                   rate=0.5, on=False, name="x", sizes=[1, 2], pair=(0.9, 0.99),
                   decay=[(".*/kernel", 0.1)], stages=[dict(steps=3)], word=arg),
    ))
"""


@pytest.fixture
def toy(tmp_path):
    """A config file; returns its path as text."""
    path = tmp_path / "toy.py"
    path.write_text(CONFIG)
    return str(path)


def message(error):
    return error.value.args[0]


# Words


def test_words_are_read_by_the_type_of_their_default():
    """Catches values left as text and defaults that get lost."""
    got = presets.parse_arg("smoke, foo=3", foo=1, rate=0.5, name="a")
    assert got == {"smoke": True, "foo": 3, "rate": 0.5, "name": "a"}
    assert presets.parse_arg("") == {"smoke": False}


@pytest.mark.parametrize(
    ("arg", "part"),
    [
        ("smok", "unknown word 'smok' in the config's argument 'smok'; did you mean smoke?"),
        ("foo=x", "foo: expected int, got 'x'"),
        ("foo", "expected 'foo=VALUE', got 'foo'"),
        ("smoke=1", "expected 'smoke' alone, got 'smoke=1'"),
        ("foo=1,foo=2", "'foo' is given twice"),
    ],
)
def test_a_wrong_word_says_what_was_expected(arg, part):
    """Catches a misspelt `smoke` that silently starts the full run."""
    with pytest.raises(ValueError) as error:
        presets.parse_arg(arg, foo=1)
    assert part in message(error)


def test_base_checks_its_words_and_has_the_fixed_sections():
    """Catches a config that accepts any word, and a section that goes missing."""
    sections = ["data", "evals", "losses", "mesh", "models", "optim", "recipe", "seed", "train"]
    assert sorted(presets.base("smoke")) == sections
    with pytest.raises(ValueError, match="unknown word 'tiny'"):
        presets.base("tiny")


def test_numbers_of_the_optimizer_are_floats_whatever_is_written():
    """Catches lr=1 in a config, after which `--config.optim.lr=1e-3` would be refused."""
    optim = presets.adamw(lr=1, clip=1, decay=0)
    assert [type(optim[k]) for k in ("lr", "clip", "decay", "warmup", "b1", "b2")] == [float] * 6


def test_smoke_changes_only_the_keys_that_are_there():
    """Catches keys that smoke invents and values that decide what is computed."""
    c = ConfigDict({"models": {"a": {"init": "hf:x", "head": "scalar"}, "b": {"init": "hf:y"}}})
    c.data = {"path": "pairs.jsonl", "source": "jsonl"}
    c.train = {"steps": 1000, "compute": "bfloat16"}
    assert presets.smoke(c, "other").data.path == "pairs.jsonl"
    got = presets.to_dict(presets.smoke(c, "other, smoke"))
    assert got == {
        "models": {"a": {"init": "tiny", "head": "scalar"}, "b": {"init": "tiny"}},
        "data": {"path": "synthetic", "source": "jsonl"},
        "train": {"steps": 4, "compute": "bfloat16"},
    }


def test_smoke_refuses_a_key_of_another_meaning():
    """Catches a config whose `batch` is a section or a fraction, overwritten by a number."""
    c = ConfigDict({"models": {}, "data": {"batch": 0.5}, "train": {}})
    with pytest.raises(ValueError, match=r"config\.data\.batch: smoke expects int"):
        presets.smoke(c)


# Finding and loading


def test_a_file_is_loaded_locked_without_a_warning(toy):
    """Catches `load_module()` and its DeprecationWarning, and a config that takes new keys."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = presets.load(f"{toy}:hello")
    assert config.model.word == "hello"
    assert config.is_locked and config.model.is_locked
    with pytest.raises(AttributeError):
        config.model.widht = 3


def test_an_edit_is_seen_at_once(toy, tmp_path):
    """Catches stale bytecode: an edit of the same length within the same second."""
    assert presets.load(toy).model.width == 32
    (tmp_path / "toy.py").write_text(CONFIG.replace("width=32", "width=64"))
    assert presets.load(toy).model.width == 64


def test_shipped_configs_are_found_in_a_checkout_and_in_a_wheel(tmp_path, monkeypatch):
    """Catches a loader that works from the checkout only, or takes a stranger's configs/."""
    package = tmp_path / "lib" / "jaxreward"
    beside = tmp_path / "lib" / "configs" / "paper"
    inside = package / "_configs" / "paper"
    for folder in (beside, inside):
        folder.mkdir(parents=True)
        (folder / "_common.py").write_text("")
    (beside / "checkout.py").write_text(CONFIG)
    (inside / "wheel.py").write_text(CONFIG)
    monkeypatch.setattr(presets, "__file__", str(package / "presets.py"))
    assert list(presets.shipped()) == ["paper/wheel"]
    assert presets.load("paper/wheel:a").model.word == "a"
    (package / "_configs").rename(tmp_path / "elsewhere")
    assert presets.shipped() == {}
    (tmp_path / "lib" / "pyproject.toml").write_text("")
    assert list(presets.shipped()) == ["paper/checkout"]


@pytest.mark.parametrize("name", ["reward_model/bradley_tery", "reward_model/bradley_tery.py"])
def test_a_missing_config_names_the_shipped_ones(name):
    """Catches a bare file error for a misspelt name."""
    with pytest.raises(FileNotFoundError) as error:
        presets.load(name)
    assert "did you mean reward_model/bradley_terry" in message(error)
    assert "a shipped name: " in message(error)


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("x = 1\n", "has no get_config(arg='')"),
        ("get_config = 3\n", "has no get_config(arg='')"),
        ("def get_config():\n    return None\n", "takes no argument, so ':smoke' cannot be used"),
        ("def get_config(arg):\n    return {}\n", "returned dict, expected a ml_collections"),
        ("x = 1\nraise RuntimeError('boo')\n", "bad.py:2: RuntimeError: boo"),
        ("def get_config(arg):\n    return absent\n", "bad.py:2: NameError"),
        ("def (:\n", "SyntaxError"),
    ],
)
def test_a_broken_config_file_is_a_value_error_with_its_place(tmp_path, source, part):
    """Catches tracebacks of the loader in place of what is wrong with the file."""
    (tmp_path / "bad.py").write_text(source)
    with pytest.raises(ValueError) as error:
        presets.load(f"{tmp_path / 'bad.py'}:smoke")
    assert part in message(error)
    assert "bad.py" in message(error)


def test_a_config_may_have_no_argument(tmp_path):
    """Catches a loader that always passes one."""
    (tmp_path / "plain.py").write_text(
        "from ml_collections import ConfigDict\n\n"
        "def get_config():\n    return ConfigDict(dict(a=1))\n"
    )
    assert presets.load(str(tmp_path / "plain.py")).a == 1


# Overrides


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=7", "seed", 7),
        ("model.width=-1", "model.width", -1),
        ("model.rate=1", "model.rate", 1.0),
        ("model.rate=1e-3", "model.rate", 1e-3),
        ("model.on=true", "model.on", True),
        ("model.on=0", "model.on", False),
        ("model.name=a=b c", "model.name", "a=b c"),
        ("model.name=", "model.name", ""),
        ("model.name=none", "model.name", "none"),
        ("model.rank=8", "model.rank", 8),
        ("model.rank=none", "model.rank", None),
        ("model.sizes=[3]", "model.sizes", [3]),
        ("model.sizes=(3, 4)", "model.sizes", [3, 4]),
        ("model.sizes[1]=9", "model.sizes", [1, 9]),
        ("model.pair=1,2", "model.pair", (1.0, 2.0)),
        ("model.pair[0]=1", "model.pair", (1.0, 0.99)),
        ("model.decay=[]", "model.decay", []),
        ("model.decay[0][1]=1", "model.decay", [(".*/kernel", 1.0)]),
        ("model.stages[0].steps=5", "model.stages", [{"steps": 5}]),
    ],
)
def test_an_override_is_read_by_the_type_of_its_field(toy, override, key, value):
    """Catches values left as text, ints in float fields, and list items out of reach."""
    config = presets.load(toy, [override])
    for part in key.split("."):
        config = config[part]
    assert config == value
    assert type(config) is type(value)


def test_the_last_of_two_overrides_wins(toy):
    """Catches an order that is not that of the command line."""
    assert presets.load(toy, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("model.widht=3", "unknown key config.model.widht; did you mean width? keys there: bare, "),
        ("modle.width=3", "unknown key config.modle; did you mean model? keys there: model, seed"),
        ("model.zzz=3", "unknown key config.model.zzz; keys there: "),
        ("seed.x=3", "unknown key config.seed.x; config.seed is a single value, 0"),
        ("model.sizes[2]=3", "unknown item '[2]' of config.model.sizes; it is a list of 2"),
        ("model.sizes.x=3", "unknown item 'x' of config.model.sizes"),
        ("model.stages[0].stps=3", "unknown key config.model.stages[0].stps; did you mean steps?"),
    ],
)
def test_a_misspelt_key_is_a_key_error_with_the_near_miss(toy, override, text):
    """Catches a misspelt override that is ignored or adds a key nobody reads."""
    with pytest.raises(KeyError) as error:
        presets.load(toy, [override])
    assert message(error).startswith(text)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("model.width=1.5", "config.model.width: expected int, got '1.5'"),
        ("model.width=", "config.model.width: expected int, got ''"),
        ("model.width=true", "config.model.width: expected int, got 'true'"),
        ("model.rank=x", "config.model.rank: expected int, got 'x'"),
        ("model.rate=fast", "config.model.rate: expected float (a finite number), got 'fast'"),
        ("model.rate=nan", "config.model.rate: expected float (a finite number), got 'nan'"),
        ("model.on=yes", "config.model.on: expected bool (true or false), got 'yes'"),
        ("model.sizes=3", "config.model.sizes: expected list"),
        ("model.sizes=['a']", "config.model.sizes: expected list"),
        ("model.sizes=[1.5]", "config.model.sizes: expected list"),
        ("model.sizes[0]=x", "config.model.sizes[0]: expected int, got 'x'"),
        ("model.pair=(open('x'), 1)", "config.model.pair: expected tuple"),
        ("model.bare=3", "config.model.bare is None and so has no type"),
        ("model=3", "config.model is a section; set one of its keys"),
        ("seed", "override 'seed': expected 'section.key=value'"),
        ("=3", "override '=3': expected 'section.key=value'"),
    ],
)
def test_a_wrong_value_is_a_value_error_with_key_type_and_value(toy, override, text):
    """Catches text that reaches a number's field, NaN learning rates, and evaluated code."""
    with pytest.raises(ValueError) as error:
        presets.load(toy, [override])
    assert message(error).startswith(text)


plain = st.one_of(
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(),
    st.lists(st.integers()),
    st.tuples(st.text(), st.booleans()),
)


@given(plain)
def test_spell_is_the_inverse_of_an_override(value):
    """Catches a remedy in an error text that does not do what it says."""
    config = ConfigDict({"key": value})
    overrides.override(config, "key", overrides.spell(value))
    assert config.key == value and type(config.key) is type(value)


# Comparing and saving


def test_diff_shows_every_changed_key_once(toy):
    """Catches changes that are missed: of type, of a list, of a key on one side only."""
    old, new = presets.load(toy), presets.load(toy, ["seed=1", "model.sizes[0]=5", "model.rank=2"])
    new = new.unlock()
    new.model.extra = 1
    del new.model.name
    assert presets.diff(old, new) == {
        "model.extra": (presets.ABSENT, 1),
        "model.name": ("x", presets.ABSENT),
        "model.rank": (None, 2),
        "model.sizes": ([1, 2], [5, 2]),
        "seed": (0, 1),
    }
    assert presets.diff({"a": 1}, {"a": True}) == {"a": (1, True)}
    assert presets.diff({"a": {}}, {"a": {"b": 1}}) == {
        "a": ({}, presets.ABSENT),
        "a.b": (presets.ABSENT, 1),
    }


def test_a_saved_config_comes_back_without_a_difference(toy, tmp_path):
    """Catches tuples, placeholders and unset fields that change on the way through JSON."""
    config = presets.load(toy)
    presets.save(config, tmp_path / "config.json")
    back = presets.read(tmp_path / "config.json")
    assert presets.diff(config, back) == {}
    assert back.is_locked and back.model.rank is None and back.model.stages[0]["steps"] == 3


def test_the_saved_bytes_are_sorted_and_stable(tmp_path):
    """Catches a file that depends on the order in which a config was written."""
    presets.save(ConfigDict({"b": 1, "a": {"d": 2.0, "c": "é"}}), tmp_path / "1.json")
    presets.save(ConfigDict({"a": {"c": "é", "d": 2.0}, "b": 1}), tmp_path / "2.json")
    text = (tmp_path / "1.json").read_text(encoding="utf-8")
    assert text == '{\n  "a": {\n    "c": "é",\n    "d": 2.0\n  },\n  "b": 1\n}\n'
    assert (tmp_path / "2.json").read_text(encoding="utf-8") == text


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    """Catches a config.json cut in half by a full disk, and temporary files left behind."""
    presets.save({"a": 1}, tmp_path / "config.json")
    monkeypatch.setattr(presets.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        presets.save({"a": 2}, tmp_path / "config.json")
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 1}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (print, "config.model.loss: <built-in function print> is a builtin_function"),
        ([1, {"x": math.inf}], r"config.model.loss\[1\].x is inf"),
    ],
)
def test_what_json_cannot_hold_is_named_by_its_key(value, text):
    """Catches a config that trains for hours and cannot be written or read back."""
    with pytest.raises(ValueError, match=text):
        presets.to_dict(ConfigDict({"model": {"loss": value}}))


def test_reading_says_what_is_wrong_with_the_file(tmp_path):
    """Catches JSON errors that do not name the file."""
    path = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match="no config at"):
        presets.read(path)
    path.write_text('{"a": ')
    with pytest.raises(ValueError, match=r"config\.json is not the JSON of a config"):
        presets.read(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
        presets.read(path)


def test_references_between_fields_are_followed(tmp_path):
    """Catches a save that writes the reference object, or an override that cuts it."""
    config = ConfigDict({"a": 2})
    config.b = config.get_oneway_ref("a") * 3
    overrides.override(config, "a", "5")
    assert presets.to_dict(config) == {"a": 5, "b": 15}
    assert config_dict.placeholder(int).get() is None
