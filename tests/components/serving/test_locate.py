"""Which checkpoint a server takes: by folder, by registry, and only the one that a release pinned."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.runtime import artifacts
from components.runtime.errors import InputError
from components.runtime.object_store import open_store
from components.runtime.registry import Registry
from components.runtime.settings import Settings
from components.serving.load import locate

OTHER = "0" * 64


def test_a_folder_is_taken_only_with_the_digest_that_was_asked_for(checkpoint: Path) -> None:
    digest = artifacts.file_sha256(checkpoint / "config.json")
    assert locate(str(checkpoint), Settings.read({}), digest) == (checkpoint, checkpoint.name, digest[:12])
    with pytest.raises(InputError, match=f"is the checkpoint {digest[:12]}, but 000000000000 was asked for"):
        locate(str(checkpoint), Settings.read({}), OTHER)


@pytest.mark.slow
def test_a_version_is_taken_only_with_the_digest_that_was_released(checkpoint: Path, tmp_path: Path) -> None:
    settings = Settings.read({"SPARSELINE_RUNS": str(tmp_path / "runs"), "SPARSELINE_STORE": str(tmp_path / "store")})
    store = open_store(settings.store)
    pointer = artifacts.publish(store, "checkpoint", checkpoint, stage="test", run={"run_id": "test"})
    version = Registry(settings).promote(pointer)
    for name in ("models:/sparseline@champion", f"models:/sparseline/{version.version}"):
        directory, _, fingerprint = locate(name, settings, pointer.sha256)
        assert fingerprint == pointer.sha256[:12]
        assert (directory / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
        with pytest.raises(InputError, match="sparseline release"):
            locate(name, settings, OTHER)
