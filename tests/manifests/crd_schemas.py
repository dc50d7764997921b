"""Turns CustomResourceDefinitions into the JSON schemas that the checks use: no descriptions, unknown keys refused.

    python tests/manifests/crd_schemas.py FILE.yaml ...     # writes tests/manifests/schemas/KIND-GROUP-VERSION.json

Where each schema came from stands in schemas/README.md.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

SCHEMAS = Path(__file__).resolve().parent / "schemas"
# Parts that no manifest of ours may use: left out, so they are refused and the schema stays small.
SERVERS = "huggingface lightgbm model onnx paddle pmml pytorch sklearn tensorflow triton workerSpec xgboost"
POD = "affinity ephemeralContainers initContainers topologySpreadConstraints resourceClaims schedulingGates"
RAY_PODS = (
    "spec.rayClusterSpec.headGroupSpec.template.spec",
    "spec.rayClusterSpec.workerGroupSpecs.items.template.spec",
)
UNUSED = {
    "RayJob": (
        "status",
        "spec.submitterPodTemplate",
        "spec.rayClusterSpec.autoscalerOptions",
        "spec.rayClusterSpec.headGroupSpec.headService",
        "spec.rayClusterSpec.headGroupSpec.ingressOptions",
        *(f"{pod}.{name}" for pod in RAY_PODS for name in POD.split()),
    ),
    "InferenceService": (
        "status",
        "spec.explainer",
        "spec.transformer",
        "spec.predictor.initContainers",
        *(f"spec.predictor.{name}" for name in SERVERS.split()),
    ),
    "Application": ("status", "operation"),
}  # fmt: skip


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema as JSON Schema that refuses unknown keys wherever the API server would drop them."""
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if key in ("description", "default") or key.startswith("x-kubernetes-"):
            continue
        if key == "properties":
            kept[key] = {name: strict(inner) for name, inner in value.items()}
        elif key in ("items", "additionalProperties", "not") and isinstance(value, dict):
            kept[key] = strict(value)
        elif key in ("allOf", "anyOf", "oneOf"):
            kept[key] = [strict(inner) if "properties" not in inner else inner for inner in value]
        elif key != "format":
            kept[key] = value
    if schema.get("x-kubernetes-int-or-string"):
        kept.pop("anyOf", None)
        kept["type"] = ["integer", "string"]
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if "properties" in schema and not open_ended:
        kept["additionalProperties"] = False
    if schema.get("nullable") and isinstance(kept.get("type"), str):
        kept["type"] = [kept["type"], "null"]
    return kept


def convert(definition: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """File name to schema, for every served version of a CustomResourceDefinition."""
    spec, found = definition["spec"], {}
    for version in spec["versions"]:
        if not version.get("served"):
            continue
        schema = strict(version["schema"]["openAPIV3Schema"])
        for path in UNUSED.get(spec["names"]["kind"], ()):
            *parents, last = path.split(".")
            inside = schema
            for name in parents:
                inside = inside["items"] if name == "items" else inside["properties"][name]
            inside["properties"].pop(last, None)
        schema.setdefault("properties", {}).update(
            apiVersion={"const": f"{spec['group']}/{version['name']}"},
            kind={"const": spec["names"]["kind"]},
            metadata={"type": "object", "required": ["name"]},
        )
        schema["required"] = sorted({*schema.get("required", []), "apiVersion", "kind", "metadata"})
        found[f"{spec['names']['kind'].lower()}-{spec['group']}-{version['name']}.json"] = schema
    return found


def main(paths: list[str]) -> None:
    for path in paths:
        for definition in yaml.safe_load_all(Path(path).read_text()):
            if definition and definition.get("kind") == "CustomResourceDefinition":
                for name, schema in convert(definition).items():
                    (SCHEMAS / name).write_text(json.dumps(schema, separators=(",", ":"), sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
