"""One contract, two stores: a directory and a real SeaweedFS."""

import concurrent.futures
import datetime
import hashlib
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import minio.time
import pytest

from components.runtime.embedded_store import free_ports
from components.runtime.errors import InputError
from components.runtime.object_store import DirectoryStore, S3Store, key_of, open_store
from pipelines.faults.gate import Gate

ROOT = Path(__file__).parents[3]


@pytest.fixture(params=["directory", "seaweed"])
def store(request, tmp_path):
    if request.param == "directory":
        return DirectoryStore(tmp_path / "store")
    seaweed = request.getfixturevalue("seaweed")
    prefix = f"{seaweed.uri}/{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:12]}"
    return S3Store(prefix, seaweed.endpoint, seaweed.access_key, seaweed.secret_key)


def test_bytes_and_files_come_back_as_they_were(store, tmp_path):
    data = os.urandom(100_003)
    (tmp_path / "in").write_bytes(data)
    store.put_file("a/b/file.bin", tmp_path / "in")
    store.put_bytes("a/empty", b"")
    store.get_file("a/b/file.bin", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == data
    assert store.get_bytes("a/b/file.bin") == data
    assert store.get_bytes("a/empty") == b""


def test_a_multipart_sized_file_keeps_its_hash(seaweed, tmp_path):
    data = os.urandom(1 << 20) * 11  # above minio's part size of 5 MiB
    (tmp_path / "in").write_bytes(data)
    seaweed.put_file("large", tmp_path / "in")
    seaweed.get_file("large", tmp_path / "out")
    assert hashlib.sha256((tmp_path / "out").read_bytes()).digest() == hashlib.sha256(data).digest()


def test_put_replaces_and_remove_removes(store):
    store.put_bytes("k", b"one")
    store.put_bytes("k", b"two")
    assert store.get_bytes("k") == b"two"
    assert store.exists("k")
    store.remove("k")
    assert not store.exists("k")


def test_keys_are_listed_by_prefix(store):
    for key in ("x/1", "x/2/3", "y/1"):
        store.put_bytes(key, b".")
    assert store.keys("x/") == ["x/1", "x/2/3"]
    assert store.keys() == ["x/1", "x/2/3", "y/1"]


def test_a_missing_object_is_a_missing_file(store, tmp_path):
    with pytest.raises(FileNotFoundError):
        store.get_bytes("nothing")
    with pytest.raises(FileNotFoundError):
        store.get_file("nothing", tmp_path / "x")
    assert not store.exists("nothing")


def test_uris_of_another_store_are_refused(store):
    assert key_of(store, f"{store.uri}/a/b") == "a/b"
    with pytest.raises(InputError, match="does not lie in the store"):
        key_of(store, "s3://somewhere-else/a")


def test_no_key_leaves_the_directory(tmp_path):
    store = DirectoryStore(tmp_path / "store")
    with pytest.raises(InputError, match="outside the store"):
        store.put_bytes("../escaped", b"")
    assert not (tmp_path / "escaped").exists()


def test_a_failed_write_leaves_nothing(tmp_path):
    store = DirectoryStore(tmp_path / "store")
    with pytest.raises(FileNotFoundError):
        store.put_file("k", tmp_path / "does-not-exist")
    assert store.keys() == []
    assert [p for p in (tmp_path / "store").rglob("*") if p.is_file()] == []


def test_what_a_killed_writer_left_is_swept_and_what_is_being_written_is_not(tmp_path):
    program = """
import sys
from pathlib import Path
from components.runtime.object_store import DirectoryStore
with DirectoryStore(Path(sys.argv[1]))._whole("a/b") as path:
    path.write_bytes(b"half")
    print("written", flush=True)
    sys.stdin.read()
"""
    store = DirectoryStore(tmp_path / "store")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    writer = subprocess.Popen([sys.executable, "-c", program, str(store.directory)], cwd=ROOT, **pipes)
    assert writer.stdout.readline() == b"written\n"
    assert store.sweep() == 0
    writer.kill()
    writer.wait()
    assert [path.read_bytes() for path in store.directory.rglob(".incomplete-*")] == [b"half"]
    assert store.keys() == []
    assert store.sweep() == 1
    assert list(store.directory.rglob(".incomplete-*")) == []


@pytest.mark.slow
@pytest.mark.parametrize("how", ["refuses", "hangs"])
def test_a_store_that_was_there_is_waited_for(seaweed, how):
    gate = Gate(*seaweed.endpoint.removeprefix("http://").split(":"))
    store = S3Store(seaweed.uri, f"http://127.0.0.1:{gate.port}", seaweed.access_key, seaweed.secret_key)
    store.put_bytes("waited", b"1")
    gate.shut(how)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(store.put_bytes, "waited", b"2")
        with pytest.raises(TimeoutError):
            answer.result(timeout=4.0)
        assert seaweed.get_bytes("waited") == b"1"
        gate.open()
        answer.result(timeout=60)
    assert seaweed.get_bytes("waited") == b"2"
    gate.close()


def test_wrong_credentials_are_an_input_error(seaweed):
    for access, secret in ((seaweed.access_key, "wrong"), ("wrong", seaweed.secret_key)):
        stranger = S3Store(seaweed.uri, seaweed.endpoint, access, secret)
        with pytest.raises(InputError, match="refused the credentials"):
            stranger.get_bytes("k")


@pytest.mark.parametrize("days", [-3, 3])
def test_a_clock_that_is_far_off_is_told(seaweed, monkeypatch, days):
    now = minio.time.utcnow
    monkeypatch.setattr(minio.time, "utcnow", lambda: now() + datetime.timedelta(days=days))
    with pytest.raises(InputError, match=r"the clock of this machine and that of http://.* are too far apart"):
        seaweed.get_bytes("k")


def test_nobody_reads_without_credentials(seaweed):
    seaweed.put_bytes("secret", b"x")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{seaweed.endpoint}/{seaweed.bucket}/secret", timeout=10)
    assert caught.value.code == 403


def test_an_unreachable_store_is_an_input_error():
    port = free_ports(1)[0]
    with pytest.raises(InputError, match="cannot be reached"):
        S3Store("s3://bucket", f"http://127.0.0.1:{port}", "a", "b").ensure_bucket()


def test_something_that_is_no_store_is_told_apart():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        # Bound but not listening: refused at once, as by a crashed server.
        with pytest.raises(InputError, match="cannot be reached"):
            S3Store("s3://bucket", f"http://127.0.0.1:{silent.getsockname()[1]}", "a", "b").get_bytes("k")


@pytest.mark.parametrize(
    "uri, options, message",
    [
        ("", {}, "no store is given"),
        ("ftp://x/y", {}, "unknown kind of store"),
        ("s3://bucket", {}, "needs SPARSELINE_S3_ENDPOINT, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"),
        ("s3://bucket", {"endpoint": "http://h", "access_key": "a"}, "needs AWS_SECRET_ACCESS_KEY"),
        ("s3://", {"endpoint": "http://h", "access_key": "a", "secret_key": "b"}, "is no store"),
    ],
)
def test_bad_uris_say_what_to_do(uri, options, message):
    with pytest.raises(InputError, match=message):
        open_store(uri, **options)


def test_a_file_is_no_directory_store(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        open_store(str(tmp_path / "file"))
