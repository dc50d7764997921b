"""What images are made of: requirements, the installed package, and digests from a registry that speaks HTTP."""

import http.server
import re
import subprocess
import sys
import threading
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DIGEST = "sha256:" + "ab" * 32


def run(*arguments):
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=60)


def test_an_image_gets_kfp_without_its_pins():
    lines = run(ROOT / "components/requirements.py", ROOT / "pyproject.toml").stdout.splitlines()
    names = {re.split(r"[^\w-]", line, maxsplit=1)[0] for line in lines}
    assert {"torch", "mlflow", "psycopg"} <= names
    assert not {"kfp", "kfp-kubernetes"} & names


def test_the_installed_sources_have_their_entry_points(tmp_path):
    (tmp_path / "src/components").mkdir(parents=True)
    program = tmp_path / "src/components/requirements.py"
    program.write_bytes((ROOT / "components/requirements.py").read_bytes())
    (tmp_path / "src/pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env/bin/python"
    subprocess.run([python, program, "--install", tmp_path / "src/pyproject.toml"], check=True)
    code = (
        "from importlib.metadata import entry_points, version; import components;"
        "print(version('sparseline'), *sorted(e.name for e in entry_points(group='sparseline.environments')))"
    )
    told = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert told.startswith("0.1.0 ")
    assert "kg_query" in told


class Registry(http.server.BaseHTTPRequestHandler):
    """The part of the distribution API that a digest needs, with a token as Docker Hub wants it."""

    def do_HEAD(self):
        if self.headers.get("Authorization") != "Bearer abc":
            self.send_response(401)
            realm = f"http://127.0.0.1:{self.server.server_port}/token"
            self.send_header("WWW-Authenticate", f'Bearer realm="{realm}",service="s",scope="repository:a/b:pull"')
        elif self.path == "/v2/a/b/manifests/1.0":
            self.send_response(200)
            self.send_header("Docker-Content-Digest", DIGEST)
        else:
            self.send_response(404)
        self.end_headers()

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"token": "abc"}' if "scope=repository" in self.path else b"{}")

    def log_message(self, *arguments):
        pass


@pytest.fixture
def registry():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Registry) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_digest_comes_from_the_registry_by_a_token(registry):
    done = run(ROOT / "components/pin.py", f"{registry}/a/b:1.0")
    assert done.stdout.strip() == f"{registry}/a/b:1.0@{DIGEST}"


def test_what_the_registry_lacks_is_told(registry):
    done = run(ROOT / "components/pin.py", f"{registry}/a/b:2.0")
    assert done.returncode == 1
    assert "cannot pin" in done.stderr
    assert "404" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_image_without_a_registry_is_refused():
    done = run(ROOT / "components/pin.py", "python:3.11")
    assert done.returncode == 1
    assert "names no registry" in done.stderr
