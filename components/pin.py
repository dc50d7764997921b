"""Digests from a registry, by the OCI distribution API. Standard library only.

python3 components/pin.py                  # writes the digest of the base image into components/Containerfile
python3 components/pin.py IMAGE:TAG        # prints IMAGE@sha256:...
"""

import json
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

CONTAINERFILE = Path(__file__).resolve().parent / "Containerfile"
BASE = re.compile(r"(?m)^ARG BASE_IMAGE=(\S+)$")
TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)


def split(image: str) -> tuple[str, str, str]:
    """Registry, repository and tag of an image with a registry in its name. Raises ValueError for another."""
    registry, slash, rest = image.split("@")[0].partition("/")
    if not slash or not re.search(r"[.:]|^localhost$", registry):
        raise ValueError(f"{image!r} names no registry; write e.g. docker.io/library/python:3.11")
    repository, _, tag = rest.partition(":")
    return registry, repository, tag or "latest"


def digest(image: str) -> str:
    """The digest that the registry gives for the image's tag. Raises OSError when it does not answer."""
    registry, repository, tag = split(image)
    host = "registry-1.docker.io" if registry == "docker.io" else registry
    scheme = "http" if re.match(r"(localhost|127\.0\.0\.1)(:|$)", host) else "https"
    headers = {"Accept": ", ".join(TYPES)}
    for _ in range(2):
        url = f"{scheme}://{host}/v2/{repository}/manifests/{tag}"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers, method="HEAD"), timeout=30) as got:
                return str(got.headers["Docker-Content-Digest"])
        except urllib.error.HTTPError as error:
            challenge = dict(re.findall(r'(\w+)="([^"]*)"', error.headers.get("WWW-Authenticate", "")))
            if error.code != 401 or "realm" not in challenge or "Authorization" in headers:
                raise
            query = urllib.parse.urlencode({key: challenge[key] for key in ("service", "scope") if key in challenge})
            with urllib.request.urlopen(f"{challenge['realm']}?{query}", timeout=30) as answer:
                token = json.load(answer)
            headers["Authorization"] = f"Bearer {token.get('token') or token['access_token']}"
    raise OSError(f"{host} refused its own token")


def main() -> None:
    text = CONTAINERFILE.read_text()
    found = BASE.search(text)
    if found is None:
        sys.exit(f"{CONTAINERFILE} has no line ARG BASE_IMAGE=...")
    image = sys.argv[1] if len(sys.argv) > 1 else found[1]
    try:
        pinned = f"{image.split('@')[0]}@{digest(image)}"
    except (OSError, ValueError) as error:
        sys.exit(f"cannot pin {image}: {error}")
    if len(sys.argv) == 1:
        CONTAINERFILE.write_text(BASE.sub(f"ARG BASE_IMAGE={pinned}", text))
    print(pinned)


if __name__ == "__main__":
    main()
