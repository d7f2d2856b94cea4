"""Python's garbage collector is paused in the block and restored afterwards."""

import gc

import pytest

from visper.common.collector import collector_paused


@pytest.mark.parametrize("running", [True, False])
def test_the_collector_is_left_as_it_was(running):
    before = gc.isenabled()
    (gc.enable if running else gc.disable)()
    try:
        with pytest.raises(ImportError), collector_paused():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == running
    finally:
        (gc.enable if before else gc.disable)()
