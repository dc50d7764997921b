"""Compiles kernels for GPUs that are not there, in a process of its own (the tests' process runs Triton's interpreter).

A request is {"function": "module:name", "arguments": {name: type}, "constants": {...}, "options": {...}, "capability":
90}. python ahead_of_time.py < requests.json prints [{"shared": bytes, "spills": bytes, "instructions": {...}}] in
their order.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile

COUNTED = ["wgmma.mma_async", "cp.async.cg", "mma.sync", "setmaxnreg"]


def compile_all(requests: list[dict]) -> list[dict]:
    """To be called from tests: starts the process and raises what it printed where it fails."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment["PYTHONPATH"] = root
    with tempfile.TemporaryDirectory() as cache:
        environment["TRITON_CACHE_DIR"] = cache
        done = subprocess.run(
            [sys.executable, os.path.abspath(__file__)],
            input=json.dumps(requests),
            capture_output=True,
            text=True,
            env=environment,
            timeout=500,
        )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return json.loads(done.stdout.splitlines()[-1])


def _compile(request: dict) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    module, name = request["function"].split(":")
    function = getattr(importlib.import_module(module), name)
    constants = request["constants"]
    signature = {a: "constexpr" if a in constants else request["arguments"][a] for a in function.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, a in enumerate(function.arg_names)
        if signature[a].startswith("*") or "stride" in a
    }
    source_type = GluonASTSource if function.is_gluon() else ASTSource
    source = source_type(function, signature, constants, aligned)
    target = GPUTarget("cuda", request["capability"], 32)
    compiled = triton.compile(source, target=target, options=request["options"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    stack = max(int(x) for x in re.findall(r"STACK:(\d+)", usage))
    counts = {word: compiled.asm["ptx"].count(word) for word in COUNTED}
    return {"shared": compiled.metadata.shared, "stack": stack, "instructions": counts}


if __name__ == "__main__":
    results = [_compile(request) for request in json.load(sys.stdin)]
    print(json.dumps(results))
