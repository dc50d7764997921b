"""Atomic publishing and verified fetching."""

import hashlib
import json

import pytest

from components.runtime.artifacts import fetch, publish, read_manifest
from components.runtime.contracts import Pointer
from components.runtime.errors import InputError
from components.runtime.object_store import DirectoryStore, key_of


@pytest.fixture
def data(tmp_path):
    directory = tmp_path / "data"
    (directory / "inner").mkdir(parents=True)
    (directory / "weights.bin").write_bytes(b"\x00\x01" * 500)
    (directory / "inner" / "config.json").write_text("{}")
    return directory


@pytest.fixture
def store(tmp_path):
    return DirectoryStore(tmp_path / "store")


def put(store, data, **fields):
    return publish(store, "checkpoint", data, stage="pretraining", run={"sparseline": "run-1"}, **fields)


def stored(store, pointer, name):
    return store.directory / key_of(store, pointer.uri) / name


def test_the_manifest_tells_the_truth(store, data):
    parent = Pointer(kind="task-set", uri="s3://x/y", sha256="0" * 64)
    pointer = put(store, data, parents=[parent], facts={"loss": 1.5})
    raw = stored(store, pointer, "manifest.json").read_bytes()
    assert hashlib.sha256(raw).hexdigest() == pointer.sha256
    manifest = json.loads(raw)
    assert {f["path"]: (f["bytes"], f["sha256"]) for f in manifest["files"]} == {
        "weights.bin": (1000, hashlib.sha256(b"\x00\x01" * 500).hexdigest()),
        "inner/config.json": (2, hashlib.sha256(b"{}").hexdigest()),
    }
    assert manifest["parents"] == [parent.model_dump()]
    assert manifest["facts"] == {"loss": 1.5}
    assert manifest["stage"] == "pretraining"
    assert manifest["run"] == {"sparseline": "run-1"}


def test_fetch_gives_the_same_files(store, data, tmp_path):
    place = fetch(store, put(store, data), tmp_path / "inputs")
    assert (place / "weights.bin").read_bytes() == (data / "weights.bin").read_bytes()
    assert (place / "inner" / "config.json").read_text() == "{}"


def test_publishing_twice_is_harmless_and_other_content_lies_elsewhere(store, data):
    first = put(store, data)
    assert put(store, data) == first
    (data / "weights.bin").write_bytes(b"other")
    second = put(store, data)
    assert second.uri != first.uri
    read_manifest(store, first)


def test_the_manifest_is_written_last(store, data, monkeypatch):
    written = []
    for name in ("put_file", "put_bytes"):
        original = getattr(store, name)
        monkeypatch.setattr(
            store, name, lambda key, value, original=original: (written.append(key), original(key, value))[1]
        )
    put(store, data)
    assert len(written) == 3
    assert [key.endswith("manifest.json") for key in written] == [False, False, True]


def test_a_publication_that_stops_half_way_is_invisible(store, data, monkeypatch, tmp_path):
    pointer = put(store, data)
    other = DirectoryStore(tmp_path / "other")
    original, calls = other.put_file, []

    def fails_at_the_second(key, path):
        calls.append(key)
        if len(calls) == 2:
            raise OSError("the network went away")
        original(key, path)

    monkeypatch.setattr(other, "put_file", fails_at_the_second)
    with pytest.raises(OSError, match="network"):
        put(other, data)
    assert len(other.keys()) == 1
    half = Pointer(kind="checkpoint", uri=pointer.uri.replace("/store/", "/other/"), sha256=pointer.sha256)
    with pytest.raises(InputError, match="is not in the store"):
        fetch(other, half, tmp_path / "inputs")


@pytest.mark.parametrize("name", ["weights.bin", "inner/config.json"])
def test_a_damaged_file_is_refused_and_nothing_stays(store, data, tmp_path, name):
    pointer = put(store, data)
    path = stored(store, pointer, name)
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match=f"{name} is damaged"):
        fetch(store, pointer, tmp_path / "inputs")
    assert list((tmp_path / "inputs").iterdir()) == []


def test_a_missing_file_is_named(store, data, tmp_path):
    pointer = put(store, data)
    stored(store, pointer, "weights.bin").unlink()
    with pytest.raises(InputError, match=r"weights\.bin is missing from the store"):
        fetch(store, pointer, tmp_path / "inputs")


def test_a_changed_manifest_is_refused(store, data, tmp_path):
    pointer = put(store, data)
    path = stored(store, pointer, "manifest.json")
    path.write_text(path.read_text().replace("pretraining", "someone_else"))
    with pytest.raises(InputError, match="its sha256 is not the pointer's"):
        fetch(store, pointer, tmp_path / "inputs")


def test_a_pointer_of_another_kind_is_refused(store, data):
    pointer = put(store, data)
    with pytest.raises(InputError, match="holds a checkpoint, not a task-set"):
        read_manifest(store, pointer.model_copy(update={"kind": "task-set"}))


def test_a_manifest_cannot_name_files_outside(store, data, tmp_path):
    pointer = put(store, data)
    path = stored(store, pointer, "manifest.json")
    path.write_text(path.read_text().replace("weights.bin", "../../../evil"))
    forged = pointer.model_copy(update={"sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    with pytest.raises(InputError, match="lies outside"):
        fetch(store, forged, tmp_path / "inputs")
    assert not (tmp_path / "evil").exists()


def test_a_local_copy_that_was_spoilt_is_fetched_again(store, data, tmp_path):
    pointer = put(store, data)
    place = fetch(store, pointer, tmp_path / "inputs")
    (place / "weights.bin").write_bytes(b"spoilt")
    assert (fetch(store, pointer, tmp_path / "inputs") / "weights.bin").read_bytes() == b"\x00\x01" * 500


def test_nothing_to_publish_is_an_error(store, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no file"):
        put(store, tmp_path / "empty")
