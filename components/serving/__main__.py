"""Serve a checkpoint:

    python -m components.serving --model models:/sparseline@champion --port 8080
    python -m components.serving --model path/to/checkpoint --port 8080 --served-model-name my-model

Run the serving check, a stage of the pipeline:

    python -m components.serving check --config check.yaml
"""

from __future__ import annotations

import argparse
import errno
import os
import socket
import sys
from dataclasses import replace

import torch
import uvicorn

from components.runtime.errors import InputError, exit_code
from components.runtime.processes import die_with_owner
from components.runtime.settings import Settings
from components.serving.load import load, locate
from components.serving.server import Limits, create_app

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def serve(arguments: list[str]) -> None:
    """Load the checkpoint, listen, serve until SIGTERM or Ctrl-C. Raises InputError for what the user can repair."""
    parser = argparse.ArgumentParser(prog="python -m components.serving", description="OpenAI-compatible server.")
    parser.add_argument("--model", required=True, help="checkpoint directory, or models:/NAME@ALIAS")
    parser.add_argument("--digest", default="", help="sha256 that the checkpoint's manifest must have")
    parser.add_argument("--served-model-name", help="name that clients use (default: the model's own)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 in a container")
    parser.add_argument("--port", type=int, default=8080, help="0: a free one, printed when ready")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-sequences", type=int, default=Limits.max_sequences, help="requests in the batch")
    parser.add_argument(
        "--max-sequence-tokens", type=int, default=Limits.max_sequence_tokens, help="context, in tokens"
    )
    parser.add_argument("--max-waiting", type=int, default=Limits.max_waiting, help="requests that may wait")
    options = parser.parse_args(arguments)
    # a busy port is found before a large checkpoint is read
    listener = listen(options.host, options.port)
    directory, name, fingerprint = locate(options.model, Settings.read(), options.digest)
    served = load(directory, name, fingerprint, dtype=DTYPES[options.dtype], device=options.device)
    served = replace(served, name=options.served_model_name or name)
    limits = Limits(options.max_sequences, options.max_sequence_tokens, options.max_waiting)
    host, port = listener.getsockname()[:2]
    print(f"serving {served.name} ({fingerprint}) on http://{host}:{port}/v1", flush=True)
    config = uvicorn.Config(create_app(served, limits), log_level="warning", timeout_graceful_shutdown=5)
    uvicorn.Server(config).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises InputError when the port is taken or the address is not ours."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"port {port} on {host} is in use; choose another with --port (0: a free one)") from error
        raise InputError(f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}") from error
    return listener


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["check"]:
        from components.runtime.stage import main as stage_main

        stage_main(
            "serving",
            run="components.serving.check:run",
            config_class="components.serving.config:ServingConfig",
            arguments=arguments[1:],
        )
        return
    die_with_owner()
    try:
        serve(arguments)
    except InputError as error:
        print(f"serving: {error}", file=sys.stderr)
        sys.exit(exit_code(error))


if __name__ == "__main__":
    main()
