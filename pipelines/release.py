"""`sparseline release`: the commit that makes an environment serve a model version.

Git decides what serves. The commit writes the version's number and the sha256 of its checkpoint into the chart's values
of an overlay, on a branch of its own, and only for a model whose evaluation and gate verdict compute again. Nothing is
checked out: the base's file is fetched, edited in memory and pushed, so that a working tree is never touched, whatever
state it is in. Reverting the commit serves the version before.
"""

from __future__ import annotations

import difflib
import os
import time
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml
from dulwich.client import HTTPProxyUnauthorized, HTTPUnauthorized, SendPackError, get_transport_and_path
from dulwich.config import ConfigFile, StackedConfig
from dulwich.errors import GitProtocolError, NotGitRepository
from dulwich.object_store import tree_lookup_path
from dulwich.objects import Blob, Commit, ObjectID, Tree
from dulwich.pack import pack_objects_to_data
from dulwich.repo import MemoryRepo
from rich.console import Console

from components.runtime.errors import InputError, without_password
from components.runtime.registry import ModelVersion
from components.runtime.settings import Settings
from pipelines.verify import EXIT_UNVERIFIED, registered, show, verified

AUTHOR = "Sparseline <sparseline@localhost>"
# What a repository that is not there, does not answer or says no shows as.
REFUSALS = (NotGitRepository, GitProtocolError, SendPackError, HTTPUnauthorized, HTTPProxyUnauthorized, OSError)
TIMEOUT_SECONDS = 60.0  # without an answer, over HTTP
USERNAME, PASSWORD = "SPARSELINE_GIT_USERNAME", "SPARSELINE_GIT_PASSWORD"


@dataclass(frozen=True)
class Place:
    """Where the commit goes: repository (a folder or a URL), branch it starts from, values file inside it."""

    repository: str
    base: str
    values: str

    @property
    def shown(self) -> str:
        return without_password(self.repository)


@dataclass(frozen=True)
class Base:
    """What the repository holds: the base's commit, its values file, and the commit of the release's branch or None."""

    commit: Commit
    text: str
    mode: int
    ours: bytes | None
    objects: MemoryRepo


def release(
    settings: Settings, model: str, place: Place, *, branch: str, author: str, commit: bool, sample: int, seed: int,
    console: Console,
) -> int:  # fmt: skip
    """Verify `model` (an alias, a version number or a models:/ URI) and write, or only show, the commit.

    Returns the exit code: 0 when the commit is there (or would be, or is not needed), 3 when the model does not verify.
    Where nothing is left to do nothing is verified either, so that this may be called every few minutes.
    Raises InputError when there is no such model, repository, branch or file, or the push is refused.
    """
    version = registered(settings, model)
    branch = branch or f"release/{version.name}-{version.version}"
    base = fetched(place, branch)
    text = pinned(base.text, version, place.values)
    if text == base.text:
        console.print(f"{place.values} on {place.base} serves {version.name} version {version.version} already")
        return 0
    if holds(base, place, text):
        console.print(f"the branch {branch} of {place.shown} holds this already: merge it to serve", soft_wrap=True)
        return 0
    # by its number: an alias may have moved on
    _, checks = verified(settings, version.version, sample=sample, seed=seed, console=console)
    if not show(checks, console):
        console.print("no commit for a model that does not verify", soft_wrap=True)
        return EXIT_UNVERIFIED
    message = f"{message_of(version, base.text)}\n{len(checks)} checks of `sparseline verify` hold.\n"
    difference = difflib.unified_diff(base.text.splitlines(), text.splitlines(), place.values, place.values, "", "", 1)
    console.print("\n".join(line.rstrip("\n") for line in difference), markup=False, highlight=False, soft_wrap=True)
    console.print(f"\n{message}", markup=False, highlight=False, soft_wrap=True)
    if not commit:
        console.print(f"nothing is written; with --commit this is pushed as {branch}", soft_wrap=True)
        return 0
    made = pushed(place, branch, base, text, message, author)
    console.print(f"{made[:12]} on the branch {branch} of {place.shown}: merge it to serve", soft_wrap=True)
    return 0


def holds(base: Base, place: Place, text: str) -> bool:
    """Whether the release's branch is the base with the values `text` and nothing else."""
    if base.ours is None:
        return False
    there = base.objects[base.ours]
    assert isinstance(there, Commit)
    same = _blob(base.objects, there, place.values)
    return there.parents == [base.commit.id] and same is not None and same[1].decode() == text


def pinned(text: str, version: ModelVersion, name: str) -> str:
    """The chart's values `text` with `serving.model`, `.version` and `.digest` set; every other byte as it was.

    Raises InputError when the file `name` has no block `serving` with a `version`.
    """
    wanted = {"model": version.name, "version": int(version.version), "digest": version.pointer.sha256}
    try:
        before = yaml.safe_load(text)
        serving = _entry(yaml.compose(text), "serving")
    except yaml.YAMLError as error:
        raise InputError(f"{name} is no YAML: {error}") from error
    if serving is None or _entry(serving[1], "version") is None:
        raise InputError(
            f"{name} has no serving.version: it does not pin what serves; write `version: 1` under serving"
        )
    edits: list[tuple[int, int, str]] = []
    key_node, value_node = _entry(serving[1], "version")  # type: ignore[misc]
    flow = isinstance(serving[1], yaml.MappingNode) and serving[1].flow_style
    between = ", " if flow else "\n" + " " * key_node.start_mark.column
    for key, value in wanted.items():
        found = _entry(serving[1], key)
        # quoted: a digest of digits and one e would be a number
        written = f'"{value}"' if key == "digest" else str(value)
        if found is not None:
            edits.append((found[1].start_mark.index, found[1].end_mark.index, written))
        else:
            edits.append((value_node.end_mark.index, value_node.end_mark.index, f"{between}{key}: {written}"))
    for start, end, value in sorted(edits, key=lambda edit: edit[:2], reverse=True):
        text = text[:start] + value + text[end:]
    if yaml.safe_load(text) != {**before, "serving": {**before["serving"], **wanted}}:
        raise InputError(f"{name} cannot be edited by itself; set these under `serving` by hand: {wanted}")
    return text


def _entry(node: yaml.Node | None, key: str) -> tuple[yaml.Node, yaml.Node] | None:
    if not isinstance(node, yaml.MappingNode):
        return None
    return next(((name, value) for name, value in node.value if name.value == key), None)


def message_of(version: ModelVersion, values: str) -> str:
    before = yaml.safe_load(values)["serving"].get("version")
    return (
        f"Serve {version.name} version {version.version}\n\n"
        f"Checkpoint {version.pointer.uri}, manifest {version.pointer.sha256}.\n"
        f"Reverting this commit serves version {before} again."
    )


def _client(repository: str) -> tuple[Any, str]:
    """How to talk to a repository: the user's Git configuration (proxy, certificates), and an end to waiting."""
    ours = ConfigFile()
    ours.set((b"http",), b"timeout", str(TIMEOUT_SECONDS).encode())
    return get_transport_and_path(
        repository,
        config=StackedConfig([*StackedConfig.default_backends(), ours]),
        username=os.environ.get(USERNAME) or None,
        password=os.environ.get(PASSWORD) or None,
    )


def fetched(place: Place, branch: str) -> Base:
    """The newest commit of the base branch with its trees, and where the release's branch stands.

    Raises InputError when the repository, the branch or the file is not there.
    """
    client, path = _client(place.repository)
    refs: dict[bytes, bytes] = {}
    memory = MemoryRepo()
    names = {name: f"refs/heads/{name}".encode() for name in (place.base, branch)}

    def wants(offered: dict[bytes, bytes], depth: int | None = None) -> list[bytes]:
        refs.update(offered)
        return [offered[name] for name in names.values() if name in offered]

    try:
        client.fetch(path, memory, determine_wants=wants, depth=1)
    except REFUSALS as error:
        raise InputError(
            f"the repository {place.shown} cannot be read: {error or type(error).__name__}; give a folder "
            f"or a URL, and for one that asks who you are {USERNAME} and {PASSWORD}"
        ) from error
    if names[place.base] not in refs:
        branches = sorted(name[11:].decode() for name in refs if name.startswith(b"refs/heads/"))
        raise InputError(f"{place.shown} has no branch {place.base}; there are {', '.join(branches) or 'none'}")
    commit = memory[refs[names[place.base]]]
    assert isinstance(commit, Commit)
    found = _blob(memory, commit, place.values)
    if found is None:
        raise InputError(f"{place.values} is no file on the branch {place.base} of {place.shown}")
    return Base(commit, found[1].decode(), found[0], refs.get(names[branch]), memory)


def _blob(memory: MemoryRepo, commit: Commit, path: str) -> tuple[int, bytes] | None:
    try:
        mode, found = tree_lookup_path(memory.get_object, commit.tree, path.encode())
    except KeyError:
        return None
    blob = memory[found]
    return (mode, blob.data) if isinstance(blob, Blob) else None


def pushed(place: Place, branch: str, base: Base, text: str, message: str, author: str) -> str:
    """Commit `text` over the base and push it as `branch`; the commit's id.

    A branch that was made from an older base is moved. Raises InputError when the push is refused, for instance
    because somebody moved the branch in the meantime.
    """
    objects, root = _replaced(base.objects, base.commit.tree, PurePosixPath(place.values).parts, text, base.mode)
    commit = Commit()
    commit.tree, commit.parents = root, [base.commit.id]
    commit.author = commit.committer = author.encode()
    commit.author_time = commit.commit_time = int(time.time())
    commit.author_timezone = commit.commit_timezone = 0
    commit.encoding, commit.message = b"UTF-8", message.encode()
    objects.append(commit)
    reference = f"refs/heads/{branch}".encode()

    def update(offered: dict[bytes, bytes]) -> dict[bytes, bytes]:
        if offered.get(reference) != base.ours:
            raise InputError(f"somebody moved the branch {branch} of {place.shown}; run again")
        return {reference: commit.id}

    client, path = _client(place.repository)
    try:
        result = client.send_pack(
            path, update, lambda have, want, **_: pack_objects_to_data([(one, None) for one in objects])
        )
    except REFUSALS as error:
        raise InputError(f"{place.shown} refuses the branch {branch}: {error or type(error).__name__}") from error
    refused = (result.ref_status or {}).get(reference)
    if refused:
        raise InputError(f"{place.shown} refuses the branch {branch}: {refused}")
    return str(commit.id.decode())


def _replaced(
    memory: MemoryRepo, tree_id: ObjectID, parts: tuple[str, ...], text: str, mode: int
) -> tuple[list[Blob | Tree | Commit], ObjectID]:
    """The blob and the trees above it that are new when the file at `parts` becomes `text`, and the new tree's id."""
    tree = memory[tree_id]
    assert isinstance(tree, Tree)
    name = parts[0].encode()
    new: list[Blob | Tree | Commit]
    if len(parts) == 1:
        blob = Blob.from_string(text.encode())
        new, below = [blob], blob.id
    else:
        folder, child = tree[name]
        new, below = _replaced(memory, child, parts[1:], text, mode)
        mode = folder
    changed = tree.copy()
    assert isinstance(changed, Tree)
    changed[name] = (mode, below)
    return [*new, changed], changed.id
