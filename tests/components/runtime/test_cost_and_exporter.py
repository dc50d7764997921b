"""What a stage costs, and what a scrape of its Prometheus endpoint shows while it runs."""

import json
import socket
import subprocess
import sys
import time
import types
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel

from components.runtime.errors import InputError
from components.runtime.settings import Settings
from components.runtime.stage import StageResult, execute

REFERENCES = {"run": "costly_stage:run", "config": "costly_stage:Config"}
BYTES = 3_000_000


class Config(BaseModel):
    port: int = 0


def run(config, context, inputs):
    context.progress.phase("reading")
    context.progress.update(3, 8)
    context.tracker.metrics({"loss": 2.0, "rl/kl": 0.25}, 1)
    context.tracker.metrics({"loss": 1.5}, 2)
    began = time.process_time()
    while time.process_time() - began < 0.3:
        pass
    # a child that burns half a second
    burn = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", burn], check=True)
    (context.work_dir / "data").write_bytes(b"x" * BYTES)
    context.store.put_file("some/data", context.work_dir / "data")
    assert len(context.store.get_bytes("some/data")) == BYTES
    shown = urllib.request.urlopen(f"http://127.0.0.1:{config.port}/metrics").read().decode() if config.port else ""
    return StageResult({}, {"shown": shown})


@pytest.fixture
def settings(tmp_path, monkeypatch):
    module = types.ModuleType("costly_stage")
    module.run, module.Config = run, Config
    monkeypatch.setitem(sys.modules, "costly_stage", module)

    def read(**more):
        values = {"SPARSELINE_RUNS": str(tmp_path), "SPARSELINE_RUN_ID": "r1", "SPARSELINE_MIRRORED": "1"}
        return Settings.read({**values, **more})

    return read


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_cost(settings):
    execute("pretraining", {}, 0, {}, settings(), echo=False, **REFERENCES)
    cost = json.loads((settings().stage_directory("pretraining") / "summary.json").read_text())["cost"]
    assert 0.75 <= cost["core_seconds"] < 20
    assert (cost["bytes_written"], cost["bytes_read"]) == (BYTES, BYTES)
    assert 2e7 < cost["peak_memory_bytes"] < 2e10
    assert cost["gpu_seconds"] == 0


def test_a_scrape(settings):
    port = free_port()
    result = execute(
        "pretraining", {"port": port}, 0, {}, settings(SPARSELINE_METRICS_PORT=str(port)), echo=False, **REFERENCES
    )
    found = {
        (sample.name, sample.labels.get("name") or sample.labels.get("phase")): sample
        for family in text_string_to_metric_families(result.summary["shown"])
        for sample in family.samples
    }
    assert found["sparseline_stage_step", "reading"].value == 3
    assert found["sparseline_stage_steps", "reading"].value == 8
    assert found["sparseline_curve", "loss"].value == 1.5
    assert found["sparseline_curve", "rl/kl"].value == 0.25
    assert found["sparseline_curve", "loss"].labels == {"run": "r1", "stage": "pretraining", "name": "loss"}
    assert found["process_resident_memory_bytes", None].value > 1e7
    with socket.socket() as probe:  # nothing listens any more
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_port_that_is_taken_or_none(settings):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(InputError, match=rf"port {port} \(SPARSELINE_METRICS_PORT\) cannot be used"):
            execute("pretraining", {}, 0, {}, settings(SPARSELINE_METRICS_PORT=port), echo=False, **REFERENCES)
    with pytest.raises(InputError, match="SPARSELINE_METRICS_PORT is 'many'; give a port"):
        settings(SPARSELINE_METRICS_PORT="many")
