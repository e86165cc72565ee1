"""jaxreward: reward models, preference optimisation and diffusion language models in JAX.

Importing the package is cheap: submodules load on first use and no JAX backend is started.
"""

import importlib

__version__ = "0.1.0"

_SUBMODULES = (
    "cli",
    "core",
    "data",
    "evals",
    "hub",
    "models",
    "objectives",
    "parallel",
    "presets",
    "recipes",
    "report",
    "rewards",
    "sampling",
    "testing",
    "train",
)

__all__ = ["__version__", *_SUBMODULES]


def __getattr__(name):
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
