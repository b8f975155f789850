"""Serve a trained model to OpenAI's clients and a browser: `python launchers/serve.py --checkpoint runs/demo`.

The API is at http://127.0.0.1:8000/v1, and a page to chat with the model at http://127.0.0.1:8000. Needs
`pip install 'megatronish[serve]'`.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from megatronish.errors import UserError, exit_on_user_error
from megatronish.inference.arguments import add_loading, model_parser, open_model
from megatronish.launch.process import initialize_process


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = model_parser("serve.py", __doc__)
    add = parser.add_argument
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on; any but this machine needs a key")
    add("--port", type=int, default=8000, metavar="N", help="(8000)")
    add("--api-key-file", type=Path, metavar="FILE", help="the key of clients (or the variable MEGATRONISH_API_KEY)")
    add("--model-name", metavar="NAME", help="the model's name for clients (the name of its folder)")
    add("--slots", type=int, metavar="N", help="sequences per batch (what fits a quarter of free memory, up to 64)")
    add("--max-context", type=int, metavar="N", help="tokens of prompt and answer (the model's context)")
    add("--max-waiting", type=int, default=64, metavar="N", help="further requests in the queue (64)")
    add("--timeout", type=float, default=300.0, metavar="S", help="seconds that a request may take (300)")
    add("--max-body", type=int, default=1 << 20, metavar="BYTES", help="size of a request (1048576)")
    add(
        "--keep-prefixes",
        action="store_true",
        help="reuse the cached prefix of a slot's last prompt; rounds differently",
    )
    add_loading(parser, compiled=True)
    return parser


def main() -> int:
    arguments = build_parser().parse_args()
    with exit_on_user_error():
        if not 0 < arguments.port < 1 << 16:
            raise UserError(f"--port {arguments.port} must be from 1 to 65535")
        if not arguments.timeout > 0 or arguments.max_body < 1:
            raise UserError(f"--timeout {arguments.timeout:g} and --max-body {arguments.max_body} must be above 0")
        for package in ("fastapi", "uvicorn", "prometheus_client"):
            if find_spec(package) is None:
                raise UserError(f"{package} is not installed: pip install 'megatronish[serve]'")
        initialize_process()
        from megatronish.inference.server.admission import read_api_key  # torch: only after the process is set up
        from megatronish.inference.server.app import serve

        key = read_api_key(arguments.host, arguments.api_key_file)
        serve(open_model(arguments), key, arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
