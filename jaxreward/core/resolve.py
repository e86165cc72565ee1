"""Names in configs become functions: "preference.bradley_terry" -> jaxreward.objectives.preference.

There is no registry and no decorator. A function is found where it is written, so adding a file
to a layer is enough to make its functions available by name.
"""

import difflib
import functools
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys

_PACKAGE = __name__.split(".")[0]


def resolve(layer, name, /, **kwargs):
    """The function called `name`, with `kwargs` bound to it.

    `name` is "module.function" or "module:function". The module is looked for in the layer
    first (jaxreward.<layer>.<module>) and then as a full path of its own, so a function outside
    the package is named "my_package.my_module:function", and one of a notebook
    "__main__:function".

    Args:
      layer: Folder of the package to look in, such as "objectives", "rewards" or "evals".
      name: The name from the config.
      **kwargs: Keyword arguments to bind; their names are checked against the signature.

    Returns:
      functools.partial of the function with `kwargs`.

    Raises:
      KeyError: There is no such layer, module or public function; the text lists what there is.
      ValueError: `name` is not of the form above, or the function takes no such keyword.
    """
    module_name, separator, function_name = name.rpartition(":" if ":" in name else ".")
    if not (separator and module_name and function_name):
        raise ValueError(
            f"{layer}: expected 'module.function' or 'package.module:function', got {name!r}"
            f"{_modules_text(layer, name)}"
        )
    module = _module(layer, module_name, name)
    function = getattr(module, function_name, None)
    if function_name.startswith("_") or not callable(function):
        public = _functions(module)
        raise KeyError(
            f"{layer}: no public function {function_name!r} in {module.__name__} "
            f"(from {name!r}){near(function_name, public)} "
            f"functions there: {', '.join(public) or 'none'}"
        )
    _check_keywords(function, kwargs, f"{module.__name__}.{function_name}")
    return functools.partial(function, **kwargs)


def words(text, *, what):
    """A name and the keywords behind it: "a.b,k=1,l=x" is ("a.b", {"k": 1, "l": "x"}).

    A value that reads as a number is one, any other is a str.

    Args:
      text: As above. what: Said in front of an error.

    Raises:
      ValueError: naming a word that is no key=value or comes twice.
    """
    name, *rest = (part.strip() for part in text.split(","))
    given = {}
    for word in rest:
        key, equals, value = (part.strip() for part in word.partition("="))
        if not (key and equals):
            raise ValueError(
                f"{what}: expected key=value behind the name, as in {name},key=value; got "
                f"{word!r} in {text!r}"
            )
        if key in given:
            raise ValueError(f"{what}: {key!r} is given twice in {text!r}")
        given[key] = _number(value)
    return name, given


def _number(value):
    if re.fullmatch(r"[+-]?[0-9]+", value):
        return int(value)
    return float(value) if re.fullmatch(r"[+-]?[0-9]*\.[0-9]+(e[+-]?[0-9]+)?", value) else value


def resolve_words(layer, text):
    """The function of one argument that a text names, with the keywords behind its name.

    "pku_saferlhf.pairs,which=safer" is `resolve(layer, "pku_saferlhf.pairs", which="safer")`;
    values as `words` reads them.

    Args:
      layer: As `resolve`.
      text: "module.function", or "module.function,key=value,key=value".

    Returns:
      As `resolve`.

    Raises:
      KeyError: As `resolve`.
      ValueError: As `resolve` and `words`; or saying why one argument does not fit beside the
        keywords.
    """
    name, given = words(text, what=layer)
    found = resolve(layer, name, **given)
    try:
        inspect.signature(found).bind(None)
    except TypeError as error:
        raise ValueError(
            f"{layer}: {text!r} is called with one argument more, which does not fit: {error}"
        ) from error
    except ValueError:
        pass  # no signature, as in _check_keywords
    return found


def keywords(entry, *reserved):
    """What an entry of a config binds: all but `fn` and the reserved keys, such as "coef"."""
    return {k: v for k, v in dict(entry).items() if k not in ("fn", *reserved)}


def near(words, known):
    """The middle of an error text: what the misspelt name or names may have meant.

    Args:
      words: One name, or a list of names.
      known: The names there are.

    Returns:
      "; did you mean a or b?" for the names in `known` that look alike, or ";" where none does.
    """
    words = [words] if isinstance(words, str) else words
    close = [match for word in words for match in difflib.get_close_matches(word, known, n=2)]
    return f"; did you mean {' or '.join(dict.fromkeys(close))}?" if close else ";"


def _module(layer, module_name, name):
    for path in (f"{_PACKAGE}.{layer}.{module_name}", module_name):
        if _exists(path):
            return importlib.import_module(path)
    raise KeyError(
        f"{layer}: no module {module_name!r} (from {name!r}){_modules_text(layer, module_name)}; "
        "a function of your own is named 'package.module:function', and its package must be "
        "importable"
    )


def _exists(path):
    """Whether `path` can be imported. A module that exists but fails to import is another matter:
    its own error is the one to show."""
    if path in sys.modules:
        return True
    parent = path.rpartition(".")[0]
    if parent and not _exists(parent):
        return False
    if parent and not hasattr(importlib.import_module(parent), "__path__"):
        return False  # a plain module has no submodules
    # ValueError: an empty or relative name such as ".x".
    try:
        return importlib.util.find_spec(path) is not None
    except ValueError:
        return False


def _modules_text(layer, word):
    if not _exists(f"{_PACKAGE}.{layer}"):
        known = _modules(_PACKAGE, packages=True)
        return f"; there is no layer {layer!r}{near(layer, known)} layers: {', '.join(known)}"
    known = _modules(f"{_PACKAGE}.{layer}")
    return f"{near(word, known)} modules there: {', '.join(known) or 'none'}"


def _modules(package, packages=False):
    """Public names inside `package`: its modules, or only its subpackages."""
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return sorted(m.name for m in found if not m.name.startswith("_") and (m.ispkg or not packages))


def _functions(module):
    """Names of the public callables that are written in `module`, not imported into it."""
    return sorted(
        key
        for key, value in vars(module).items()
        if not key.startswith("_")
        and callable(value)
        and getattr(value, "__module__", None) == module.__name__
    )


def _check_keywords(function, kwargs, where):
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return  # some functions written in C publish no signature; they check for themselves
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    accepted = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    unknown = [key for key in kwargs if key not in accepted]
    if unknown:
        raise ValueError(
            f"{where} does not take {', '.join(unknown)}{near(unknown, accepted)} "
            f"it accepts: {', '.join(accepted) or 'no keywords'}"
        )
