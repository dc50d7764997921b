"""Bad input at the command line: one message, exit code 2, nothing half-written. And the doctor."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from components.runtime.embedded_store import free_ports
from pipelines.run import only_run

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def sparseline(*arguments, **environment):
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("SPARSELINE_", "AWS_", "MLFLOW_"))
    }
    return subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *arguments],
        cwd=ROOT,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def check_refused(done, told):
    assert done.returncode == 2, done.stdout + done.stderr
    assert told in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--profile", "giant"], "unknown profile 'giant'; there are distributed, micro, nano, speciale"),
        (["--set", "synthesis.trian_tasks=1"], "trian_tasks: Extra inputs are not permitted"),
        (["--set", "pretraining.dense.steps=x"], "dense.steps: Input should be a valid integer"),
        (["--seed", "-1"], "--seed"),
        (["--nonsense"], "--nonsense"),
        (["--base", "/nowhere"], "the base checkpoint /nowhere has no config.json"),
        (["--pipeline", "/nowhere.yaml"], "the compiled pipeline /nowhere.yaml does not exist"),
        (["--store", "ftp://x"], "unknown kind of store 'ftp://x'"),
        (["--store", "s3://bucket"], "needs SPARSELINE_S3_ENDPOINT"),
        (["--store", "/dev/null"], "is a file"),
    ],
)
def test_a_run_refuses(tmp_path, arguments, told):
    runs = tmp_path / "runs"
    check_refused(sparseline("run", "--profile", "micro", "--runs", str(runs), *arguments), told)
    assert not runs.exists() or {path.name for path in runs.iterdir()} <= {".lock"}


def test_a_run_refuses_a_store_that_does_not_answer(tmp_path):
    done = sparseline(
        "run", "--profile", "micro", "--runs", str(tmp_path / "runs"), "--store", "s3://bucket",
        SPARSELINE_S3_ENDPOINT=f"http://127.0.0.1:{free_ports(1)[0]}",
        AWS_ACCESS_KEY_ID="a",
        AWS_SECRET_ACCESS_KEY="b",
    )  # fmt: skip
    check_refused(done, "cannot be reached")
    assert {path.name for path in (tmp_path / "runs").iterdir()} <= {".lock"}


def test_a_run_refuses_a_broken_tracking_database(tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "mlflow.db").write_bytes(b"no database" * 1000)
    done = sparseline("run", "--profile", "micro", "--runs", str(runs), "--store", str(tmp_path / "store"))
    check_refused(done, "cannot be used")
    assert not list(runs.glob("2*"))


def test_two_runs_do_not_share_a_folder(tmp_path):
    with only_run(tmp_path):
        done = sparseline("run", "--profile", "micro", "--runs", str(tmp_path))
        check_refused(done, f"another sparseline (process {os.getpid()}) uses {tmp_path}")


def test_the_ui_refuses_a_port_in_use_and_a_folder_without_runs(tmp_path):
    check_refused(sparseline("ui", "--runs", str(tmp_path)), "run `sparseline run` first")
    (tmp_path / "mlflow.db").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        check_refused(sparseline("ui", "--runs", str(tmp_path), "--port", str(port)), f"port {port}")


def test_compile_and_profiles(tmp_path):
    done = sparseline("compile", "--profile", "micro", "--output", str(tmp_path / "deep" / "p.yaml"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "deep" / "p.yaml").read_text().startswith("# PIPELINE DEFINITION")
    assert "micro" in sparseline("profiles").stdout


def test_the_doctor_needs_nothing_but_python(tmp_path):
    """-I -S: no site packages, no environment; run from another folder."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(ROOT / "pipelines" / "doctor.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode in (0, 2), done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith(("ok", "missing")) and "Python 3" in line for line in lines)
    assert any("disk" in line for line in lines)
    assert any("make install" in line for line in lines)
    assert lines[-1] == "ready" or "missing" in lines[-1]
