"""Serve a trained model to OpenAI's clients and a browser: `python launchers/serve.py --checkpoint runs/demo`.

http://127.0.0.1:8000/v1 is what a client needs, http://127.0.0.1:8000 a page to talk to the model. Needs
`pip install 'megatronish[serve]'`.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from megatronish.errors import UserError, exit_on_user_error
from megatronish.inference.arguments import add_compile, add_quantize, model_parser, open_model
from megatronish.launch.process import initialize_process

KEY_VARIABLE = "MEGATRONISH_API_KEY"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = model_parser("serve.py", __doc__)
    add = parser.add_argument
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen; others than this machine need a key")
    add("--port", type=int, default=8000, metavar="N", help="(8000)")
    add(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"the key that clients must send (or the variable {KEY_VARIABLE})",
    )
    add("--model-name", metavar="NAME", help="what clients call the model (the name of its folder)")
    add(
        "--slots",
        type=int,
        metavar="N",
        help="sequences written side by side (what a quarter of free memory holds, up to 64)",
    )
    add("--max-context", type=int, metavar="N", help="tokens of prompt and answer (the model's context)")
    add(
        "--max-waiting", type=int, default=64, metavar="N", help="further requests that may wait; more are refused (64)"
    )
    add("--timeout", type=float, default=300.0, metavar="S", help="seconds that a request may take (300)")
    add("--max-body", type=int, default=1 << 20, metavar="BYTES", help="size of a request (1048576)")
    add(
        "--keep-prefixes",
        action="store_true",
        help="do not read again what a slot's last prompt began with; rounds differently",
    )
    add_quantize(parser)
    add_compile(parser)
    return parser


def api_key(arguments: argparse.Namespace) -> str | None:
    """The key that clients must send. Raises UserError where one is needed and there is none."""
    key = os.environ.get(KEY_VARIABLE)
    if arguments.api_key_file is not None:
        try:
            key = arguments.api_key_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise UserError(f"--api-key-file {arguments.api_key_file}: cannot be read ({error.strerror})") from None
        if not key:
            raise UserError(f"--api-key-file {arguments.api_key_file}: is empty")
    if not key and not is_loopback(arguments.host):
        raise UserError(
            f"--host {arguments.host}: whoever reaches this address could use the model. Set an API key in "
            f"{KEY_VARIABLE} or --api-key-file, or listen on 127.0.0.1"
        )
    return key or None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def main() -> int:
    arguments = build_parser().parse_args()
    with exit_on_user_error():
        key = api_key(arguments)
        if not 0 < arguments.port < 1 << 16:
            raise UserError(f"--port {arguments.port} must be from 1 to 65535")
        if not arguments.timeout > 0 or arguments.max_body < 1:
            raise UserError(f"--timeout {arguments.timeout:g} and --max-body {arguments.max_body} must be above 0")
        for package in ("fastapi", "uvicorn", "prometheus_client"):
            if find_spec(package) is None:
                raise UserError(f"{package} is not installed: pip install 'megatronish[serve]'")
        initialize_process()
        import uvicorn  # torch and the rest: only after the process is settled

        from megatronish.inference.server.app import Limits, create_app
        from megatronish.inference.server.scheduler import Scheduler

        loaded = open_model(arguments)
        scheduler = Scheduler(
            loaded,
            slots=arguments.slots,
            max_context=arguments.max_context,
            max_waiting=arguments.max_waiting,
            keep_prefixes=arguments.keep_prefixes,
            compiled=arguments.compile,
        )
        name = arguments.model_name or loaded.info.run_dir.resolve().name
        app = create_app(scheduler, name, api_key=key, limits=Limits(arguments.timeout, arguments.max_body))
        print(
            f"{loaded.info.folder} as {name!r}: {scheduler.slots} slots of {scheduler.max_context:,} tokens, cache "
            f"{scheduler.cache_bytes / 1e6:,.0f} MB; http://{arguments.host}:{arguments.port}",
            file=sys.stderr,
        )
        uvicorn.run(app, host=arguments.host, port=arguments.port, log_level="warning", timeout_graceful_shutdown=5)
    return 0


if __name__ == "__main__":
    sys.exit(main())
