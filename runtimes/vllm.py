"""Serve with vLLM and the exact guard: ``python -m runtimes.vllm --model ARTIFACT [vLLM's own flags]``.

vLLM stays as it is. Its answers carry the guard's verdicts in ``kv_transfer_params``; see ``runtimes.vllm_guard``.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click

from safevlm.errors import InputError
from safevlm.imports.siblings import ROOT
from safevlm.terminal.child import module_arguments
from safevlm.terminal.commandline import run

__all__ = ["server_flags"]

SHARED_MEMORY = Path("/dev/shm")
CONNECTOR, MODULE = "SafeVLMGuard", "runtimes.vllm_guard.connector"
NEEDED = ("safevlm", "runtimes")
"""Packages that vLLM's processes import: linked into a folder of their own, so that nothing else of ours is found."""
OURS = ("--kv-transfer-config", "--speculative-config", "-sc", "--model-tag")
SERVER = ("-m", "vllm.entrypoints.openai.api_server")
BLOCK_SIZE = 32


def server_flags(
    model: Path, storage: Path, found: dict[str, Any], flags: Sequence[str], *, allow_untested: bool = False
) -> list[str]:
    """Return vLLM's flags for a server with the guard; ``found`` is what ``runtimes.vllm_guard`` said of the model.

    Raises InputError for a flag that would take the guard out.
    """
    for flag in flags:
        if flag.split("=", 1)[0].replace("_", "-") in OURS:
            raise InputError(f"{flag.split('=', 1)[0]} is what the guard is connected by. Leave it out.")
    extra = {"shared_storage_path": str(storage), "head_sha256": found["head"], "classes": found["classes"]}
    transfer = {
        "kv_connector": CONNECTOR,
        "kv_connector_module_path": MODULE,
        "kv_role": "kv_producer",
        "kv_connector_extra_config": extra | ({"allow_untested_vllm": True} if allow_untested else {}),
    }
    speculative = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": [found["layers"]]}},
    }
    sized = any(flag.split("=", 1)[0].replace("_", "-") == "--block-size" for flag in flags)
    return [
        "--model", str(model), *([] if sized else ["--block-size", str(BLOCK_SIZE)]),
        "--speculative-config", json.dumps(speculative), "--kv-transfer-config", json.dumps(transfer), *flags,
    ]  # fmt: skip


@click.command(name="vllm", context_settings={"ignore_unknown_options": True})
@click.option(
    "--model", type=click.Path(path_type=Path), required=True, help="Folder of a checkpoint from export.hf or quantize."
)
@click.option("--bundle", type=click.Path(path_type=Path), help="Guard bundle that the model must belong to.")
@click.option("--python", default=sys.executable, help="Interpreter of the environment that has vLLM.  [default: this]")
@click.option(
    "--storage",
    type=click.Path(path_type=Path),
    help="Folder for verdicts on their way through vLLM.  [default: a new one in memory]",
)
@click.option("--allow-untested-vllm", is_flag=True, help="Serve with a version of vLLM that was not tested.")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="[VLLM'S FLAGS]...")
def main(
    model: Path,
    bundle: Path | None,
    python: str,
    storage: Path | None,
    allow_untested_vllm: bool,
    flags: tuple[str, ...],
) -> int:
    """Serve MODEL with vLLM, unmodified; each answer carries the exact guard's verdict on its images.

    Flags that are not listed here are vLLM's own. The exit code is vLLM's.
    """
    with _linked() as packages, _storage(storage) as folder:
        environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": _path(packages)}
        found = _checked(python, model, environment, allow_untested_vllm)
        if bundle is not None:
            _require_same_guard(bundle, model, found)
        arguments = server_flags(model, folder, found, flags, allow_untested=allow_untested_vllm)
        return _served([python, *SERVER, *arguments], environment)


def _path(packages: Path) -> str:
    earlier = os.environ.get("PYTHONPATH")
    return f"{packages}{os.pathsep}{earlier}" if earlier else str(packages)


@contextmanager
def _linked() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="safe-vlm-packages-") as folder:
        for name in NEEDED:
            (Path(folder) / name).symlink_to(ROOT / name)
        yield Path(folder)


@contextmanager
def _storage(given: Path | None) -> Iterator[Path]:
    """Yield the folder for verdicts; one that was made here is removed. Raises StorageError."""
    from runtimes.vllm_guard.storage import Storage

    if given is not None:
        yield Storage.open(given.absolute()).folder
        return
    memory = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="safe-vlm-", dir=memory))
    try:
        yield Storage.open(folder).folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _checked(python: str, model: Path, environment: dict[str, str], allow_untested: bool) -> dict[str, Any]:
    """Return what vLLM's environment says of the model. Raises InputError for what cannot be served."""
    command = [python, *module_arguments("runtimes.vllm_guard", model.absolute())]
    try:
        done = subprocess.run(
            [*command, *(["--allow-untested-vllm"] if allow_untested else [])],
            env=environment,
            capture_output=True,
            text=True,
        )
    except OSError as error:
        raise InputError(f"--python {python} cannot be run: {error.strerror}. Give a Python interpreter.") from error
    try:
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise InputError(f"--python {python} cannot read the model: {last[:300]}. Give vLLM's interpreter.") from None
    if "error" in found:
        raise InputError(str(found["error"]))
    return found


def _require_same_guard(bundle: Path, model: Path, found: dict[str, Any]) -> None:
    from runtimes.guard.bundle import open_bundle

    manifest = open_bundle(bundle).manifest
    if list(manifest.classes) != found["classes"]:
        raise InputError(f"{model} and {bundle} have different classes. Give the checkpoint that the bundle is of.")


def _served(command: list[str], environment: dict[str, str]) -> int:
    """Run the server until it ends; signals that end this process end it first."""
    child = subprocess.Popen(command, env=environment)

    def passed_on(number: int, _: FrameType | None) -> None:
        child.send_signal(number)

    earlier = {number: signal.signal(number, passed_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = child.wait()
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
        if child.poll() is None:
            child.kill()
            child.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    run(main)
