"""What the surroundings decide, not the configuration file: store, tracking server, folders. Read from the environment.

| variable | meaning |
|---|---|
| SPARSELINE_STORE | `s3://bucket/prefix`, or a directory (default: `store` in the runs folder) |
| SPARSELINE_S3_ENDPOINT | `http://host:port` of S3 or MinIO (AWS_ENDPOINT_URL is read too) |
| AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION | credentials and region |
| SPARSELINE_RUNS | folder of runs (default `runs`) |
| SPARSELINE_RUN_ID | the run that a stage belongs to (default: a new one) |
| MLFLOW_TRACKING_URI | MLflow (default: `mlflow.db`, SQLite, in the runs folder) |
| SPARSELINE_MODEL | name of the registered model (default `sparseline`) |
| MLFLOW_RUN_ID | the MLflow run to resume (KFP sets it) |
| SPARSELINE_LOG | `json`: a stage's log is a JSON object a line (default: text) |
| SPARSELINE_METRICS_PORT | port of a Prometheus endpoint of the running stage (default: none) |
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from components.runtime.errors import InputError
from components.runtime.object_store import ObjectStore, open_store

# Nobody is told what runs here: MLflow's and Ray's usage reporting stay off unless the user turns them on.
NO_USAGE_REPORTING = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "RAY_USAGE_STATS_ENABLED": "0"}


class Settings(BaseModel):
    """Settings of one process."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    runs: Path = Field(description="folder of runs, local")
    run_id: str = Field(description="id of the run that this process works for")
    store: str = Field(description="URI or directory of the object store")
    s3_endpoint: str = Field(default="", description="http(s) address of S3 or MinIO")
    access_key: str = ""
    secret_key: str = Field(default="", repr=False)
    region: str = "us-east-1"
    tracking_uri: str = Field(description="MLflow tracking URI")
    mlflow_run_id: str = Field(default="", description="MLflow run to resume; empty: create one")
    model: str = Field(default="sparseline", description="name of the registered model")
    metrics_port: int = Field(default=0, ge=0, le=65535, description="of a stage's Prometheus endpoint; 0: none")
    structured_log: bool = Field(default=False, description="a stage's log is a JSON object a line")
    mirrored: bool = Field(default=False, description="our parent carries our records into MLflow")

    @staticmethod
    def read(environment: Mapping[str, str] = os.environ) -> Settings:
        """The settings that `environment` gives, with defaults for a laptop."""
        runs = Path(environment.get("SPARSELINE_RUNS") or "runs").resolve()
        return Settings(
            runs=runs,
            run_id=environment.get("SPARSELINE_RUN_ID") or new_run_id(),
            store=environment.get("SPARSELINE_STORE") or str(runs / "store"),
            s3_endpoint=environment.get("SPARSELINE_S3_ENDPOINT") or environment.get("AWS_ENDPOINT_URL") or "",
            access_key=environment.get("AWS_ACCESS_KEY_ID") or "",
            secret_key=environment.get("AWS_SECRET_ACCESS_KEY") or "",
            region=environment.get("AWS_REGION") or "us-east-1",
            tracking_uri=environment.get("MLFLOW_TRACKING_URI") or f"sqlite:///{runs / 'mlflow.db'}",
            mlflow_run_id=environment.get("MLFLOW_RUN_ID") or "",
            model=environment.get("SPARSELINE_MODEL") or "sparseline",
            metrics_port=_port(environment.get("SPARSELINE_METRICS_PORT") or "0"),
            structured_log=_log(environment.get("SPARSELINE_LOG") or "text"),
            mirrored=environment.get("SPARSELINE_MIRRORED") == "1",
        )

    def environment(self) -> dict[str, str]:
        """The variables that give a child process the same settings."""
        values = {
            "SPARSELINE_RUNS": str(self.runs),
            "SPARSELINE_RUN_ID": self.run_id,
            "SPARSELINE_STORE": self.store,
            "SPARSELINE_S3_ENDPOINT": self.s3_endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
            "MLFLOW_TRACKING_URI": self.tracking_uri,
            "MLFLOW_RUN_ID": self.mlflow_run_id,
            "SPARSELINE_MODEL": self.model,
            "SPARSELINE_LOG": "json" if self.structured_log else "",
            "SPARSELINE_METRICS_PORT": str(self.metrics_port or ""),
            "SPARSELINE_MIRRORED": "1" if self.mirrored else "",
        }
        return {name: value for name, value in values.items() if value} | NO_USAGE_REPORTING

    def open_store(self) -> ObjectStore:
        """The object store. Raises InputError when it cannot be one."""
        return open_store(
            self.store,
            endpoint=self.s3_endpoint,
            access_key=self.access_key,
            secret_key=self.secret_key,
            region=self.region,
        )

    def stage_directory(self, stage: str) -> Path:
        """Where a stage of this run keeps its records: `<runs>/<run id>/stages/<stage>`."""
        return self.runs / self.run_id / "stages" / stage


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise InputError(f"SPARSELINE_METRICS_PORT is {text!r}; give a port, 1 to 65535, or leave it away")
    return int(text)


def _log(text: str) -> bool:
    if text not in ("json", "text"):
        raise InputError(f"SPARSELINE_LOG is {text!r}; give json or text")
    return text == "json"


def new_run_id(now: datetime | None = None) -> str:
    """A readable id that sorts by time, e.g. 20261124-190512-3fa9."""
    return f"{(now or datetime.now(UTC)):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
