"""The package itself: version, cheap import."""

import subprocess
import sys

import pytest

import jaxreward


def test_import_starts_no_backend_and_loads_nothing_heavy():
    """Catches a top-level import that makes `import jaxreward` slow or claims a device."""
    code = (
        "import sys, jaxreward\n"
        "heavy = {'jax', 'transformers', 'orbax', 'grain', 'tensorflow_datasets', 'torch'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_public_name_of_the_package_resolves():
    """Catches a submodule that is listed but cannot be imported."""
    for name in jaxreward.__all__:
        assert getattr(jaxreward, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    """Catches a lazy `__getattr__` that swallows typing mistakes."""
    with pytest.raises(AttributeError, match="reward_modle"):
        _ = jaxreward.reward_modle
