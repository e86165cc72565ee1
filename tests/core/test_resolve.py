"""Names in configs: what is found, what is bound, and what a misspelt name says."""

import functools
import sys
import types

import pytest

from jaxreward import objectives
from jaxreward.core.resolve import near, resolve, resolve_words

SOURCE = """
from functools import reduce

LIMIT = 3

def hinge_loss(chosen, rejected, *, margin=0.0, scale=1.0):
    return scale * max(0.0, margin - (chosen - rejected))

def any_words(x, **words):
    return words

def only_positional(x, y=2, /):
    return x + y

def _private():
    return None
"""


@pytest.fixture
def layer(tmp_path, monkeypatch):
    """A module `toy_losses` inside the layer `objectives`, as if its file had been added there."""
    (tmp_path / "toy_losses.py").write_text(SOURCE)
    monkeypatch.setattr(objectives, "__path__", [*objectives.__path__, str(tmp_path)])
    yield "objectives"
    sys.modules.pop("jaxreward.objectives.toy_losses", None)
    vars(objectives).pop("toy_losses", None)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A package of a user's own, `own_package.inner.losses`, on the path."""
    folder = tmp_path / "path" / "own_package" / "inner"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("")
    (folder / "__init__.py").write_text("")
    (folder / "losses.py").write_text(SOURCE)
    (folder / "broken.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    yield "own_package.inner"
    for name in [m for m in sys.modules if m.split(".")[0] == "own_package"]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["toy_losses.hinge_loss", "toy_losses:hinge_loss"])
def test_a_name_is_found_in_its_layer_and_bound(layer, name):
    """Catches a wrong module path and keywords that are dropped: 2 * (1.5 - (1.0 - 0.5)) = 2."""
    bound = resolve(layer, name, margin=1.5, scale=2.0)
    assert isinstance(bound, functools.partial)
    assert bound(1.0, 0.5) == 2.0


@pytest.mark.parametrize("form", ["{}.losses.hinge_loss", "{}.losses:hinge_loss"])
def test_a_full_path_outside_the_package_is_accepted(own, form):
    """Catches a loader that only knows its own layers."""
    assert resolve("objectives", form.format(own), margin=1.0)(0.0, 0.0) == 1.0


def test_a_function_of_the_running_script_is_accepted(monkeypatch):
    """Catches `find_spec`, which raises for a notebook's __main__ (it has no spec)."""
    notebook = types.ModuleType("__main__")
    notebook.__spec__ = None
    notebook.mine = lambda x: x + 1
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    assert resolve("objectives", "__main__:mine")(1) == 2


def test_the_layer_wins_over_a_module_of_the_same_name(layer, tmp_path, monkeypatch):
    """Catches a stray file in the working directory that replaces ours unseen."""
    (tmp_path / "stray").mkdir()
    (tmp_path / "stray" / "toy_losses.py").write_text("def hinge_loss(*a): return 'stray'\n")
    monkeypatch.syspath_prepend(str(tmp_path / "stray"))
    assert resolve(layer, "toy_losses.hinge_loss")(2.0, 0.0) == 0.0


def message(error):
    return error.value.args[0]


def test_an_unknown_module_names_those_there_and_the_near_miss(layer):
    """Catches a bare ModuleNotFoundError for a misspelt module."""
    with pytest.raises(KeyError) as error:
        resolve(layer, "toy_loses.hinge_loss")
    assert "no module 'toy_loses'" in message(error)
    assert "did you mean toy_losses?" in message(error)
    assert "modules there: " in message(error)
    assert "package.module:function" in message(error)


def test_an_unknown_function_names_the_public_ones(layer):
    """Catches a listing that shows private or imported names, or hides the near miss."""
    with pytest.raises(KeyError) as error:
        resolve(layer, "toy_losses.hinge_los")
    assert "did you mean hinge_loss?" in message(error)
    assert message(error).endswith("functions there: any_words, hinge_loss, only_positional")


@pytest.mark.parametrize("name", ["_private", "LIMIT"])
def test_private_names_and_values_are_no_functions(layer, name):
    """Catches binding of anything that happens to be an attribute."""
    with pytest.raises(KeyError, match="no public function"):
        resolve(layer, f"toy_losses.{name}")


def test_an_unknown_layer_names_the_layers():
    """Catches a misspelt layer reported as a missing module of the user."""
    with pytest.raises(KeyError) as error:
        resolve("objectivs", "preference.bradley_terry")
    assert "there is no layer 'objectivs'; did you mean objectives?" in message(error)


@pytest.mark.parametrize("name", ["hinge_loss", "", ".hinge_loss", "toy_losses.", ":f", "a:"])
def test_a_name_without_module_or_function_is_refused(layer, name):
    """Catches half a name that ends in an obscure import error."""
    with pytest.raises(ValueError, match=r"expected 'module\.function'"):
        resolve(layer, name)


def test_unknown_keywords_are_all_named_with_the_accepted_ones(layer):
    """Catches a keyword that would only fail inside the first training step."""
    with pytest.raises(ValueError) as error:
        resolve(layer, "toy_losses.hinge_loss", margn=1.0, scal=2.0, margin=0.0)
    assert message(error) == (
        "jaxreward.objectives.toy_losses.hinge_loss does not take margn, scal; "
        "did you mean margin or scale? it accepts: chosen, rejected, margin, scale"
    )


def test_a_function_with_free_keywords_takes_any(layer):
    """Catches a check that refuses **kwargs."""
    assert resolve(layer, "toy_losses.any_words", colour=1)(0) == {"colour": 1}


def test_positional_only_parameters_are_no_keywords(layer):
    """Catches a partial that could never be called."""
    with pytest.raises(ValueError, match="does not take y; it accepts"):
        resolve(layer, "toy_losses.only_positional", y=3)


def test_a_module_that_fails_to_import_shows_its_own_error(own):
    """Catches a missing dependency of a user's module reported as "no such module"."""
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        resolve("objectives", f"{own}.broken.loss")


def test_a_path_through_a_plain_module_is_no_module(own):
    """Catches an AttributeError or ModuleNotFoundError for "module.function.more"."""
    with pytest.raises(KeyError, match="no module"):
        resolve("objectives", f"{own}.losses.hinge_loss.more")


def test_near_says_nothing_where_nothing_is_near():
    """Catches suggestions that have nothing to do with the word."""
    assert near("zzz", ["margin", "scale"]) == ";"
    assert near(["margn", "margins"], ["margin"]) == "; did you mean margin?"


@pytest.mark.parametrize(
    ("words", "bound"),
    [
        ("", {}),
        (",margin=3, scale = -2", {"margin": 3, "scale": -2}),
        (",margin=0.5,scale=a=b", {"margin": 0.5, "scale": "a=b"}),
        (",margin=", {"margin": ""}),
    ],
)
def test_words_behind_a_name_are_bound(layer, words, bound):
    """Catches numbers bound as text, text read as code, and spaces that become part of a name."""
    found = resolve_words(layer, f"toy_losses.any_words{words}")
    assert found.keywords == bound and found(0) == bound


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("toy_losses.any_words,fast", "expected key=value behind the name, as in toy_losses.any_w"),
        ("toy_losses.any_words,", "got '' in 'toy_losses.any_words,'"),
        ("toy_losses.any_words,=3", "got '=3'"),
        ("toy_losses.any_words,a=1,a=2", "'a' is given twice"),
        ("toy_losses.any_words,x=1", "one argument more, which does not fit: too many positional"),
        ("toy_losses.hinge_loss", "does not fit: missing a required argument: 'rejected'"),
        ("toy_losses.hinge_loss,margn=1", "does not take margn; did you mean margin?"),
        ("toy_losses.any_words,name=1,layer=2", None),
    ],
)
def test_words_that_cannot_be_bound_are_named(layer, text, words):
    """Catches a word that is dropped, one that fails only when the function is called, and
    keywords of the user's that collide with those of `resolve`."""
    if words is None:
        assert resolve_words(layer, text)(0) == {"name": 1, "layer": 2}
        return
    with pytest.raises(ValueError) as error:
        resolve_words(layer, text)
    assert words in message(error)
