"""`sparseline release` against real Git: repositories made, served and read by the `git` program."""

from __future__ import annotations

import base64
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from components.runtime.contracts import Pointer
from components.runtime.errors import InputError
from components.runtime.registry import CHAMPION, ModelVersion, Registry
from components.runtime.settings import Settings
from pipelines.release import (
    AUTHOR,
    PASSWORD,
    USERNAME,
    Place,
    fetched,
    holds,
    message_of,
    pinned,
    pushed,
    release,
)

ROOT = Path(__file__).resolve().parents[2]
VALUES = "manifests/overlays/prod/values.yaml"
SHA = "12345678901234567890123456789012345678901234567890123456789012e4"  # unquoted, a number
SEVEN = ModelVersion("sparseline-nano", "7", Pointer(kind="checkpoint", uri="s3://bucket/checkpoint/7", sha256=SHA))
BRANCH = "release/sparseline-nano-7"

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def git(folder: Path, *arguments: str) -> str:
    # nothing of the user's own configuration
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    done = subprocess.run(
        ["git", "-c", "user.name=A", "-c", "user.email=a@b", "-C", str(folder), *arguments],
        capture_output=True, text=True, env=environment, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository of two commits with our own production overlay, and something uncommitted in its working tree."""
    folder = tmp_path / "platform"
    (folder / VALUES).parent.mkdir(parents=True)
    git(tmp_path, "init", "--quiet", "--initial-branch=main", str(folder))
    (folder / "README.md").write_text("a platform\n")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "Readme")
    shutil.copy(ROOT / VALUES, folder / VALUES)
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "Overlay")
    (folder / "README.md").write_text("being edited\n")
    return folder


def write(place: Place, version: ModelVersion = SEVEN, branch: str = BRANCH) -> str | None:
    """As `release` does it; None where the branch holds the commit already."""
    base = fetched(place, branch)
    text = pinned(base.text, version, place.values)
    if holds(base, place, text):
        return None
    return pushed(place, branch, base, text, message_of(version, base.text), AUTHOR)


def served(folder: Path, revision: str) -> dict[str, object]:
    return dict(yaml.safe_load(git(folder, "show", f"{revision}:{VALUES}"))["serving"])


def test_the_commit_changes_the_pinned_version_and_nothing_else(repository: Path) -> None:
    before = git(repository, "status", "--porcelain"), git(repository, "rev-parse", "main")
    made = write(Place(str(repository), "main", VALUES))
    assert made == git(repository, "rev-parse", BRANCH).strip()
    git(repository, "fsck", "--strict")
    assert git(repository, "diff", "--name-only", "main", BRANCH).split() == [VALUES]
    assert git(repository, "diff", "--numstat", "main", BRANCH).split()[:2] == ["3", "1"]
    assert served(repository, BRANCH) | {"version": 1} == served(repository, "main") | {
        "model": "sparseline-nano",
        "digest": SHA,
    }
    assert served(repository, BRANCH)["version"] == 7
    assert git(repository, "log", "-1", "--format=%s|%an|%P", BRANCH).strip() == (
        f"Serve sparseline-nano version 7|Sparseline|{before[1].strip()}"
    )
    # the user's working tree, index and branch are where they were
    assert (git(repository, "status", "--porcelain"), git(repository, "rev-parse", "main")) == before


def test_merged_it_serves_and_reverted_it_serves_the_version_before(repository: Path) -> None:
    old = served(repository, "main")
    write(Place(str(repository), "main", VALUES))
    git(repository, "merge", "--quiet", BRANCH)
    assert served(repository, "main")["version"] == 7
    base = fetched(Place(str(repository), "main", VALUES), BRANCH)
    assert pinned(base.text, SEVEN, VALUES) == base.text  # nothing left to do
    git(repository, "revert", "--no-edit", "HEAD")
    assert served(repository, "main") == old


def test_a_second_call_makes_no_second_commit_and_a_newer_base_moves_the_branch(repository: Path) -> None:
    place = Place(str(repository), "main", VALUES)
    first = write(place)
    assert first is not None
    assert write(place) is None
    git(repository, "commit", "--quiet", "-am", "Something else")
    second = write(place)
    assert second not in (None, first)
    assert git(repository, "log", "--format=%s", "main..release/sparseline-nano-7").split("\n")[0].startswith("Serve")
    assert len(git(repository, "log", "--format=%s", f"main..{BRANCH}").splitlines()) == 1


def test_a_branch_that_somebody_moved_is_left_alone(repository: Path) -> None:
    place = Place(str(repository), "main", VALUES)
    base = fetched(place, BRANCH)
    git(repository, "branch", BRANCH, "main~1")
    text = pinned(base.text, SEVEN, VALUES)
    with pytest.raises(InputError, match="somebody moved the branch"):
        pushed(place, BRANCH, base, text, "m", AUTHOR)
    assert git(repository, "rev-parse", BRANCH) == git(repository, "rev-parse", "main~1")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("serving:\n  version: 1  # pinned\nother: 2\n", {"serving": {"version": 7}, "other": 2}),
        ("serving: {enabled: true, version: champion}\n", {"serving": {"enabled": True, "version": 7}}),
        ('a: é\nserving:\n    digest: "00"\n    model: old\n    version: "3"\n', {"a": "é", "serving": {"version": 7}}),
    ],
)
def test_values_keep_their_comments_and_their_style(text: str, wanted: dict[str, dict[str, object]]) -> None:
    changed = pinned(text, SEVEN, "v.yaml")
    expected = {**wanted, "serving": {**wanted["serving"], "model": "sparseline-nano", "digest": SHA}}
    assert yaml.safe_load(changed) == expected
    assert ("# pinned" in changed) == ("# pinned" in text)
    assert ("{" in changed) == ("{" in text)
    assert pinned(changed, SEVEN, "v.yaml") == changed


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("serving: {enabled: false}\n", "has no serving.version"),
        ("image: {}\n", "has no serving.version"),
        ("a: [1\n", "is no YAML"),
        ("base: &b {version: 1}\nserving: *b\n", "by hand"),  # an edit there would change both
    ],
)
def test_values_that_cannot_be_pinned_are_named(text: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        pinned(text, SEVEN, "v.yaml")


def test_what_is_not_there_is_named(repository: Path, tmp_path: Path) -> None:
    for place, told in (
        (Place(str(tmp_path / "nowhere"), "main", VALUES), "cannot be read"),
        (Place(str(repository), "trunk", VALUES), "has no branch trunk; there are main"),
        (Place(str(repository), "main", "values.yaml"), "values.yaml is no file on the branch main"),
        (Place(str(repository), "main", "manifests"), "manifests is no file"),
        (Place("http://127.0.0.1:9/x.git", "main", VALUES), "cannot be read"),
    ):
        with pytest.raises(InputError, match=told):
            fetched(place, BRANCH)


def test_an_address_is_told_without_its_password() -> None:
    with pytest.raises(InputError, match=r"http://robot:\*\*\*@127.0.0.1:9/x.git cannot be read") as told:
        fetched(Place("http://robot:s3cret@127.0.0.1:9/x.git", "main", VALUES), BRANCH)
    assert "s3cret" not in str(told.value)


def test_a_server_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.release.TIMEOUT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(InputError, match="cannot be read"):
        fetched(Place(f"http://127.0.0.1:{silent.getsockname()[1]}/x.git", "main", VALUES), BRANCH)


class GitHandler(BaseHTTPRequestHandler):
    """`git http-backend`, Git's own server program, for whoever knows the password."""

    root: Path
    expected = "Basic " + base64.b64encode(b"robot:s3cret").decode()

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != self.expected:
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="git"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        path, _, query = self.path.partition("?")
        length = self.headers.get("Content-Length")
        if length is None and self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(length or 0))
        variables = {
            "GIT_PROJECT_ROOT": str(self.root), "GIT_HTTP_EXPORT_ALL": "1", "PATH_INFO": path, "QUERY_STRING": query,
            "REQUEST_METHOD": self.command, "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)), "REMOTE_USER": "robot", "PATH": os.environ["PATH"],
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
        }  # fmt: skip
        done = subprocess.run(["git", "http-backend"], input=body, env=variables, capture_output=True, timeout=60)
        head, _, content = done.stdout.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        self.send_response(int(headers.pop("Status", "200 OK").split()[0]))
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(repository: Path, tmp_path: Path) -> Iterator[str]:
    git(tmp_path, "clone", "--quiet", "--bare", str(repository), str(tmp_path / "served" / "platform.git"))
    git(tmp_path / "served" / "platform.git", "config", "http.receivepack", "true")
    handler = type("Handler", (GitHandler,), {"root": tmp_path / "served"})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_address[1]}/platform.git"
        listening.shutdown()
        thread.join()


def test_a_server_that_asks_who_you_are(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(server, "main", VALUES)
    for password in ("", "wrong-password"):
        monkeypatch.setenv(USERNAME, "robot")
        monkeypatch.setenv(PASSWORD, password)
        with pytest.raises(InputError, match=f"cannot be read.*{PASSWORD}") as told:
            fetched(place, BRANCH)
        assert "wrong-password" not in str(told.value)
    monkeypatch.setenv(PASSWORD, "s3cret")
    made = write(place)
    bare = tmp_path / "served" / "platform.git"
    assert made == git(bare, "rev-parse", BRANCH).strip()
    git(bare, "fsck", "--strict")
    assert served(bare, BRANCH)["version"] == 7
    other = ModelVersion("sparseline-nano", "8", SEVEN.pointer)
    hook = bare / "hooks" / "update"
    hook.write_text("#!/bin/sh\necho releases are closed >&2\nexit 1\n")
    hook.chmod(0o755)
    with pytest.raises(InputError, match="refuses the branch release/8"):
        write(place, other, "release/8")


@pytest.mark.slow
def test_only_a_verified_model_is_released(repository: Path, tmp_path: Path) -> None:
    from tests.pipelines.test_verify import Evidence

    evidence = Evidence(tmp_path / "evidence")
    settings = Settings.read({"SPARSELINE_RUNS": str(tmp_path / "runs"), "SPARSELINE_STORE": str(evidence.root)})
    registry = Registry(settings)
    version = registry.promote(evidence.candidate)
    console = Console(record=True, width=140)

    def call(commit: bool) -> int:
        place = Place(str(repository), "main", VALUES)
        return release(
            settings, CHAMPION, place, branch="", author=AUTHOR, commit=commit, sample=2, seed=0, console=console
        )

    branch = f"release/{version.name}-{version.version}"
    assert call(commit=False) == 0
    told = console.export_text()
    assert f'+  digest: "{version.pointer.sha256}"' in told
    assert "nothing is written" in told
    assert branch not in git(repository, "branch", "--list", "release/*")
    assert call(commit=True) == 0
    assert served(repository, branch)["digest"] == version.pointer.sha256
    assert "checks of `sparseline verify` hold" in git(repository, "log", "-1", "--format=%b", branch)
    console.export_text()
    assert call(commit=True) == 0
    told = console.export_text()
    assert "holds this already" in told
    assert "hashes" not in told  # and nothing was verified for it
    git(repository, "branch", "-D", branch)
    shutil.copy(
        evidence.file(evidence.stage.pointers["none"], "model.safetensors"),
        evidence.file(evidence.candidate, "model.safetensors"),
    )
    assert call(commit=True) == 3
    assert "no commit for a model that does not verify" in console.export_text()
    assert git(repository, "branch", "--list", "release/*") == ""
