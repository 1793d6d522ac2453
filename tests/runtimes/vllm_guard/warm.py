"""A process in vLLM's environment that has imported vLLM, and does each job in a fork of itself."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.quantize.streamed.test_consumers import ROOT, peer

__all__ = ["ENVIRONMENT", "ROOT", "Ask", "asking", "failing"]

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
Ask = Callable[[dict[str, Any]], dict[str, Any]]


@contextmanager
def asking(folder: Path) -> Iterator[Ask]:
    """Yield what has a job of ``tests/peers/vllm_guard.py`` done; skips where there is no vLLM."""
    names = itertools.count()
    more = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": str(ROOT)}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [peer("vllm"), str(ROOT / "tests" / "peers" / "vllm_guard.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=folder,
            env={**os.environ, **ENVIRONMENT, **more},
        )

        def answer(job: dict[str, Any]) -> dict[str, Any]:
            assert process.stdin is not None and process.stdout is not None
            number = next(names)
            connector = {"shared_storage_path": str(folder / f"verdicts-{number}"), **job.get("connector", {})}
            out = folder / f"{number}.json"
            process.stdin.write(json.dumps({"engine": {}, **job, "connector": connector, "out": str(out)}) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                if line.startswith('{"done"'):
                    break
            found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
            return found

        with process:
            yield answer
            assert process.stdin is not None
            process.stdin.close()


def failing(ask: Ask, job: dict[str, Any]) -> str:
    """Return how a server's start ended that is refused."""
    found = ask({"scenario": "verdicts", "rows": [], **job})
    assert "error" in found, found
    return str(found["error"]).strip().splitlines()[-1]
