"""What ``import visper`` promises."""

import subprocess
import sys

import pytest

import visper


@pytest.mark.parametrize("name", visper.__all__)
def test_every_public_name_is_there_and_documented(name):
    found = getattr(visper, name)
    assert isinstance(found, str) if name == "__version__" else found.__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'load_runs'"):
        _ = visper.load_runs


def test_importing_visper_loads_no_torch():
    code = "import sys, visper; visper.load_run; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
