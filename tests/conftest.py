"""Shared set-up: simulated devices before JAX starts, warnings as errors, checked shapes."""

import importlib.util
import os
import tempfile

import jax
import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of the time here, and tiny programs gain nothing from LLVM's optimiser.
for name, value in (
    ("xla_force_host_platform_device_count", 4),
    ("xla_backend_optimization_level", 0),
):
    if name not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{name}={value}".strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests must not read what an earlier run compiled, nor write into the home folder.
os.environ.setdefault("JAXREWARD_COMPILE_CACHE", "0")

# Shape annotations are checked at run time, in tests only. Not on the batch types: pytrees of
# shardings and of tracers pass through their constructors.
install_import_hook(
    ("jaxreward.core.masked", "jaxreward.models", "jaxreward.objectives", "jaxreward.sampling"),
    "beartype.beartype",
)


# Many tests make the same small programs; each is compiled once a session. Told to JAX and not to
# the environment: a process that a test kills must not leave half an entry behind for the others.
_PROGRAMS = tempfile.TemporaryDirectory(prefix="jaxreward_tests_")
jax.config.update("jax_compilation_cache_dir", _PROGRAMS.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")
    # Third-party notices that no code of ours can avoid.
    for line in (
        "ignore:.*load_module.*:DeprecationWarning",
        "ignore:.*SwigPy.*:DeprecationWarning",
        "ignore:.*swigvarlink.*:DeprecationWarning",
        "ignore::DeprecationWarning:etils.*",
        "ignore::DeprecationWarning:orbax.*",
    ):
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session")
def require():
    """require("torch") skips a test that lacks a tool, and fails it under JAXREWARD_CI=1."""

    def check(module):
        if importlib.util.find_spec(module) is not None:
            return
        text = f"needs the package {module}"
        if os.environ.get("JAXREWARD_CI") == "1":
            pytest.fail(text + ", and JAXREWARD_CI=1 forbids skipping")
        pytest.skip(text)

    return check


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A random tiny language model as a Hugging Face folder, to be read and not written into."""
    from jaxreward.hub import export

    return export.write_tiny(tmp_path_factory.mktemp("tiny") / "model")
