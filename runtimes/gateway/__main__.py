"""Serve: ``python -m runtimes.gateway --bundle DIR --upstream http://127.0.0.1:8000/v1``."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import click

from models.commandline import leave, run
from models.errors import InputError, MissingExtraError
from runtimes.chat_endpoint import read_key
from runtimes.policy import read_policy
from runtimes.random_weights import warn_of_random_weights

MEBIBYTE = 2**20
ENDING_SECONDS = 1.0
KEEP_ALIVE = 75
"""Seconds that an idle connection stays open: longer than clients keep theirs (httpx and openai: 5 s), so that none
sends a request just when it is closed."""


@click.command(name="gateway")
@click.option("--bundle", type=click.Path(path_type=Path), help="Folder of the guard bundle.")
@click.option("--upstream", metavar="URL", help="OpenAI-compatible server to put the guard in front of.")
@click.option("--model", help="Checkpoint or GGUF folder to answer here.  [default: what the bundle was made from]")
@click.option("--policy", type=click.Path(path_type=Path), help="TOML or JSON: per class block, allow or review.")
@click.option(
    "--runtime", type=click.Choice(["auto", "onnxruntime", "openvino", "tensorrt"]), default="auto", show_default=True
)
@click.option("--precision", help="Judge with this precision of the bundle.  [default: the bundle's own]")
@click.option("--threads", type=click.IntRange(min=1), help="Bound the threads of guard and language model.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any that is free.")
@click.option("--allow-host", multiple=True, help="Host that image URLs may name; none are fetched from by default.")
@click.option("--allow-private-hosts", is_flag=True, help="Let allowed hosts have addresses that are not public.")
@click.option("--require-image", is_flag=True, help="Refuse requests without an image, which are otherwise passed on.")
@click.option("--upstream-key-env", metavar="NAME", help="Variable with the key to send where the client sends none.")
@click.option("--api-key-env", metavar="NAME", help="Variable with the key that clients must show.")
@click.option("--show-probabilities", is_flag=True, help="Give clients p_unsafe and probs; they can find thresholds.")
@click.option("--max-body-mb", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--max-images", type=click.IntRange(min=1), default=8, show_default=True, help="In one request.")
@click.option("--max-concurrent", type=click.IntRange(min=1), default=64, show_default=True, help="Requests at once.")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Images of one guard call.")
@click.option("--batch-wait-ms", type=float, default=5.0, show_default=True, help="Wait so long for more of them.")
@click.option("--queue", type=click.IntRange(min=1), default=64, show_default=True, help="Images that may wait.")
@click.option("--guard-timeout", type=float, default=30.0, show_default=True, help="Seconds.")
@click.option("--idle-timeout", type=float, default=60.0, show_default=True, help="Seconds of silence upstream.")
@click.option("--total-timeout", type=float, default=600.0, show_default=True, help="Seconds of a whole answer.")
@click.option("--shutdown-timeout", type=int, default=30, show_default=True, help="Seconds for what is being served.")
def main(host: str, port: int, shutdown_timeout: int, **given: Any) -> int:
    """Serve chat completions, models and verdicts under /v1, and /livez, /readyz, /healthz and /metrics.

    Every image is judged first. SIGTERM and Ctrl-C let what is being served end, then exit with 0. One JSON line per
    request goes to standard output.
    """
    try:
        import uvicorn

        from runtimes.gateway.app import create_app
        from runtimes.gateway.serving import ACCESS, listening
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("uvicorn", "fastapi", "httpx", "prometheus_client"):
            raise
        raise MissingExtraError(str(error.name), "gateway", "the gateway") from error
    gateway = _gateway(given)
    warn_of_random_weights(given["bundle"], gateway.gate.language)
    app = create_app(gateway)
    _log_to_stdout(ACCESS)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=shutdown_timeout,
    )
    server = uvicorn.Server(config)
    logging.getLogger("uvicorn.error").addFilter(lambda _: app.state.failure is None)  # reported below
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again once it has ended in good order
        signal.signal(number, lambda *_: None)
    bound = listening(host, port)
    click.echo(f"serving on http://{host}:{bound.getsockname()[1]}", err=True)
    try:
        server.run(sockets=[bound])
    except SystemExit:  # uvicorn's 3 for a start that failed; here 3 is REGRESSION
        if app.state.failure is not None:
            raise app.state.failure from None
        return 1
    finally:
        bound.close()
    if not _threads_end():  # the interpreter would wait for them, and a library's may crash at its end
        leave(0 if server.started else 1)
    return 0 if server.started else 1


def _threads_end() -> bool:
    """Wait a little for the threads of gate and gateway, which were told to end; say whether they did."""
    until = time.monotonic() + ENDING_SECONDS
    ours = [each for each in threading.enumerate() if each.name.startswith("gate")]
    for each in ours:
        each.join(max(0.0, until - time.monotonic()))
    return not any(each.is_alive() for each in ours)


def _gateway(given: dict[str, Any]) -> Any:
    from runtimes.gateway.app import Gateway
    from runtimes.gateway.options import GatewayOptions

    options = GatewayOptions(
        max_body=given["max_body_mb"] * MEBIBYTE,
        max_images=given["max_images"],
        max_concurrent=given["max_concurrent"],
        guard_timeout=given["guard_timeout"],
        idle_timeout=given["idle_timeout"],
        total_timeout=given["total_timeout"],
        batch=given["batch"],
        batch_wait=given["batch_wait_ms"] / 1000,
        queue=given["queue"],
        require_image=given["require_image"],
        hosts=frozenset(given["allow_host"]),
        private_hosts=given["allow_private_hosts"],
        show_probabilities=given["show_probabilities"],
    )
    if given["bundle"] is None and given["model"] is None:
        raise InputError("nothing to serve: give --bundle (and --upstream or --model), or --model with a GGUF folder.")
    return Gateway.open(
        given["bundle"],
        upstream=given["upstream"],
        model=given["model"],
        policy=None if given["policy"] is None else read_policy(given["policy"]),
        options=options,
        key=_key(given["upstream_key_env"]),
        client_key=_key(given["api_key_env"]),
        runtime=given["runtime"],
        precision=given["precision"],
        threads=given["threads"],
    )


def _key(variable: str | None) -> str | None:
    return None if variable is None else read_key(variable, needed=True)


def _log_to_stdout(name: str) -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


if __name__ == "__main__":
    run(main)
