"""Commands run in children that kill themselves at a chosen moment: at the n-th thing they do to the file system.

A parent that has imported everything (and computed nothing, so that no library has threads) forks a child a run. It is
a process of its own, spoken to in JSON lines: ``python -m tests.killing``.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Ended", "Warm", "warm"]

ROOT = Path(__file__).parents[1]
TEXT_ROW = '{"query": "Why is the sky blue?", "answer": "Air scatters blue light more than red light."}\n'
"""Calibration rows without an image, which take no time."""
STEPS = 30
"""Of fitting a distilled head: how good it is matters to no test here."""
KINDS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink")
MODULES = (
    "quantize.gptq",
    "quantize.int8",
    "export.onnx",
    "export.gguf.__main__",
    "calibration.distill",
    "calibration.thresholds",
    "benchmarks.run",
    "benchmarks.judge",
    "benchmarks.judges.endpoint",
    "runtimes.guard.onnxruntime_runner",
    "tests.replacing",
    "benchmarks.holisafe_mini",
    "benchmarks.random_checkpoint",
    "benchmarks.regress",
    "runtimes.check",
    "transformers",
    "onnxscript",
)


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code (negative: the signal), what it did to the file system, what it said."""

    code: int
    events: int
    said: str


class Warm:
    """The parent, as its user sees it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(
        self,
        module: str,
        *arguments: str,
        under: Path,
        kill_at: int | None = None,
        most_bytes: int | None = None,
        stdout: str | None = os.devnull,
    ) -> Ended:
        """Run a command; what it does below ``under`` is counted, and it is killed at event ``kill_at``.

        No file that it writes may have more than ``most_bytes``; its standard output is a file, None closed.
        """
        request: dict[str, Any] = {"module": module, "arguments": arguments, "under": str(under), "kill_at": kill_at}
        return self._ask([request | {"most_bytes": most_bytes, "stdout": stdout}])[0]

    def run_at_once(self, module: str, arguments: Sequence[Sequence[str]], under: Path) -> list[Ended]:
        """Run a command several times at once, each with its own arguments."""
        request = {"module": module, "under": str(under), "kill_at": None, "most_bytes": None, "stdout": os.devnull}
        return self._ask([{**request, "arguments": list(each)} for each in arguments])

    def _ask(self, requests: list[dict[str, Any]]) -> list[Ended]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(requests) + "\n")
        self._process.stdin.flush()
        return [Ended(**each) for each in json.loads(self._process.stdout.readline())]


@contextmanager
def warm() -> Iterator[Warm]:
    """Start the parent; it ends with the context."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.killing"],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Warm(process)
        assert process.stdin is not None
        process.stdin.close()


def _count(under: str, kill_at: int | None, report: int) -> None:
    """Count what changes files below a folder, from here on; kill this process just before event ``kill_at``."""
    done = 0

    def happened() -> None:
        nonlocal done
        done += 1
        if done == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        os.pwrite(report, str(done).encode(), 0)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writes and isinstance(path, (str, bytes)) and os.fsdecode(path).startswith(under):
                happened()
        elif event in KINDS and _place(event, arguments).startswith(under):
            happened()

    def fsync(fd: Any) -> None:
        happened()
        real(fd)

    real, os.fsync = os.fsync, fsync
    sys.addaudithook(audit)


def _place(event: str, arguments: tuple[Any, ...]) -> str:
    """Return the path that an audit event is about; those below an open folder are told relative to it."""
    folder = arguments[-1] if event in ("os.remove", "os.rmdir") else -1
    name = os.fsdecode(arguments[0])
    return name if folder == -1 else str(Path(f"/proc/self/fd/{folder}").readlink() / name)


def _child(request: dict[str, Any], report: int, said: int) -> None:
    from safevlm.terminal.commandline import run

    os.dup2(said, 2)
    os.close(1)
    stdout = None
    if request["stdout"] is not None:
        os.open(request["stdout"], os.O_WRONLY)  # takes the number that is free
        stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = stdout  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = open(2, "w", closefd=False)  # type: ignore[misc]  # noqa: SIM115
    if request["most_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["most_bytes"], resource.RLIM_INFINITY))
    _count(request["under"], request["kill_at"], report)
    code = 1
    try:
        run(importlib.import_module(request["module"]).main, request["arguments"])
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stderr.flush()
    os._exit(code)


def _serve() -> None:
    import torch

    from calibration.distilling.student import fit_head

    torch.set_num_threads(1)
    for name in MODULES:
        importlib.import_module(name)
    fit_head.__kwdefaults__["steps"] = STEPS
    for line in sys.stdin:
        begun = [_begin(request) for request in json.loads(line)]
        sys.stdout.write(json.dumps([_end(*each) for each in begun]) + "\n")
        sys.stdout.flush()


def _begin(request: dict[str, Any]) -> tuple[int, int, int]:
    """Return the number of a process that runs a command, and what its events and its words are written to."""
    report, said = os.memfd_create("report"), os.memfd_create("said")
    process = os.fork()
    if not process:
        _child(request, report, said)
    return process, report, said


def _end(process: int, report: int, said: int) -> dict[str, Any]:
    _, status = os.waitpid(process, 0)
    events = int(os.pread(report, 20, 0) or b"0")
    text = os.pread(said, 1 << 20, 0).decode(errors="replace")
    for descriptor in (report, said):
        os.close(descriptor)
    return {"code": os.waitstatus_to_exitcode(status), "events": events, "said": text}


if __name__ == "__main__":
    _serve()
