"""Run one function in a process of its own: its memory is nobody else's, and its death is survived.

The child is a fresh interpreter, ``python -m benchmarks.speed.isolation MODULE:FUNCTION ANSWERS``, that reads its
request as JSON from standard input and appends every answer to the file ANSWERS as soon as it is there, one JSON object
a line, so that what was answered before a crash or a deadline is kept. Libraries may print what they like on the other
streams.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from safevlm.errors import SafeVLMError
from safevlm.machine import peak_rss
from safevlm.terminal.child import module_arguments

__all__ = ["Outcome", "peak_rss", "restart_peak", "run_isolated"]

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
SAID = 6000
"""Characters of a child's own words that are kept, the last ones."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a process answered, and why it ended before it was done.

    ``problem`` is None when the function came to its end. ``exit_code`` is then 0; the error's own when the function
    raised a SafeVLMError, whose message ``problem`` is; 1 for every other error, and for a process that was killed.
    ``late`` says that it was killed at its deadline. ``said`` is the end of what it printed.
    """

    answers: tuple[Mapping[str, Any], ...]
    problem: str | None = None
    exit_code: int = 0
    late: bool = False
    said: str = field(default="", compare=False, repr=False)


def run_isolated(
    function: str,
    request: Mapping[str, Any],
    *,
    threads: int,
    python: str = sys.executable,
    variables: Mapping[str, str] | None = None,
    deadline: float | None = None,
) -> Outcome:
    """Call ``MODULE:FUNCTION`` (request to an iterator of answers, all JSON) in a new process, and wait.

    ``threads`` bounds the thread pools that the libraries of the child make for themselves; ``python`` is another
    environment's interpreter, ``variables`` are set in it. After ``deadline`` seconds the child is killed; with a
    deadline, what it started ends with it, whichever way it ends.
    """
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        **dict.fromkeys(THREAD_VARIABLES, str(threads)),
        **(variables or {}),
    }
    with tempfile.TemporaryDirectory(prefix="safevlm-isolated-") as folder:
        answers, log = Path(folder, "answers"), Path(folder, "log")
        answers.touch()
        command = [python, *module_arguments("benchmarks.speed.isolation", function, answers)]
        with log.open("wb") as stream:
            child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=deadline is not None,
            )
            late = False
            try:
                child.communicate(json.dumps(request).encode(), timeout=deadline)
            except subprocess.TimeoutExpired:
                late = True
            finally:
                _end(child, whole_session=deadline is not None)
        outcome = _outcome(answers.read_text(encoding="utf-8"), child.returncode, log)
        said = log.read_text(encoding="utf-8", errors="replace")[-SAID:]
        if late:
            return replace(outcome, problem=f"not done after {deadline:.0f} s", exit_code=1, late=True, said=said)
        return replace(outcome, said=said)


def _end(child: subprocess.Popen[bytes], *, whole_session: bool) -> None:
    """Kill a child that is still there, after a deadline or an interrupt of ours, and all that a session has left."""
    if whole_session:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    elif child.poll() is None:
        child.kill()
    child.wait()


def _outcome(text: str, returned: int, log: Path) -> Outcome:
    complete = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    answers = tuple(entry["answer"] for entry in complete if "answer" in entry)
    refusals = [entry["refusal"] for entry in complete if "refusal" in entry]
    if refusals:
        return Outcome(answers=answers, problem=refusals[0]["message"], exit_code=refusals[0]["exit_code"])
    if returned < 0:
        memory = ": the machine's memory probably did not suffice" if returned == -signal.SIGKILL else ""
        return Outcome(
            answers=answers, problem=f"the process was ended by {signal.Signals(-returned).name}{memory}", exit_code=1
        )
    if returned > 0:
        written = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = written[-1] if written else "no output"
        return Outcome(answers=answers, problem=f"the process ended with code {returned}: {last}", exit_code=1)
    return Outcome(answers=answers)


def restart_peak() -> None:
    """Let :func:`peak_rss` begin again at what is held now, where Linux can (proc(5), clear_refs); else do nothing."""
    with contextlib.suppress(OSError):  # another system, or a kernel without it: the peak so far stays
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _die_first() -> None:
    """Ask Linux to end this process before any other when memory runs out (proc(5), oom_score_adj)."""
    adjustment = Path("/proc/self/oom_score_adj")
    if adjustment.is_file():
        adjustment.write_text("1000", encoding="ascii")


def _serve(function: str, answers: Path) -> None:
    """Be the child: call the function and write down what it answers."""
    _die_first()
    module, _, name = function.partition(":")
    call: Callable[[Mapping[str, Any]], Iterator[Mapping[str, Any]]] = getattr(import_module(module), name)
    request = json.loads(sys.stdin.read())
    with answers.open("a", encoding="utf-8") as stream:
        try:
            for answer in call(request):
                stream.write(json.dumps({"answer": answer}) + "\n")
                stream.flush()
        except SafeVLMError as error:
            stream.write(json.dumps({"refusal": {"message": str(error), "exit_code": error.exit_code}}) + "\n")


if __name__ == "__main__":
    _serve(sys.argv[1], Path(sys.argv[2]))
