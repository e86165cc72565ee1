"""Shared set-up: simulated devices before JAX starts, warnings as errors, a compile cache."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    ).strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import importlib.util

import pytest

REPO = Path(__file__).resolve().parents[1]


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
    """require("torch") skips a test that needs a missing tool, and fails it under JAXREWARD_CI=1."""

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
