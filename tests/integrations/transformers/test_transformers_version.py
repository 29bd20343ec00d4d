"""What is said where transformers is missing, or too old."""

import importlib.metadata
import importlib.util
import re
from pathlib import Path

import pytest

import lowmem
from lowmem.version import install_command

FILE = Path(lowmem.__file__).parent / "integrations" / "transformers" / "transformers_version.py"


@pytest.fixture
def version():
    """Return the module alone: its package needs transformers."""
    spec = importlib.util.spec_from_file_location("version_alone", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("found", "says"),
    [(None, "which is not installed"), ("5.9.1", "5.9.1 is installed"), ("4.57.0.dev0", "4.57.0.dev0 is installed")],
)
def test_it_names_the_extra(version, monkeypatch, found, says):
    def installed(name):
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(version, "version", installed)
    with pytest.raises(
        ImportError, match=r"needs transformers 5\.24 or newer.*" + re.escape(install_command("transformers"))
    ) as e:
        version.check_transformers_version()
    assert says in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("found", ["5.24.0", "5.30.0rc1", "6.0"])
def test_newer_ones_serve(version, monkeypatch, found):
    monkeypatch.setattr(version, "version", lambda name: found)
    version.check_transformers_version()


def test_without_transformers_the_integration_says_what_to_install():
    try:
        importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        with pytest.raises(ImportError, match=re.escape(install_command("transformers"))):
            importlib.import_module("lowmem.integrations.transformers")
    else:
        assert importlib.import_module("lowmem.integrations.transformers").LowmemConfig
