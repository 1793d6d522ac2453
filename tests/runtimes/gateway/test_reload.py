"""SIGHUP: a new bundle without a lost request, and each verdict with the guard that gave it."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from runtimes.guard.bundle import open_bundle
from safevlm.contract.manifest import Manifest
from tests.runtimes.bundles import fitted
from tests.runtimes.gateway.servers import SAFE_URL, Upstream, messages
from tests.runtimes.gateway.test_command import gateway


def with_block_at(bundle: Path, folder: Path, block: float) -> str:
    """Write the bundle with other thresholds; return its hash."""
    shutil.copytree(bundle, folder, dirs_exist_ok=True)
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_text())
    thresholds = fitted(manifest.files[0], block, 0.0)
    changed = manifest.model_copy(update={"thresholds": (thresholds,)})
    draft = folder / "manifest.json.new"
    draft.write_text(changed.model_dump_json())
    draft.replace(folder / "manifest.json")
    return str(open_bundle(folder).digest)


def ask(url: str) -> tuple[str, str]:
    """Return the verdict on a safe image and the hash of the bundle that it is said to be of."""
    body = {"messages": messages(SAFE_URL)}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=600)
    assert answer.status_code == 200, answer.text
    stated = answer.json()["safe_vlm"]
    return stated["verdict"], stated["bundle"]


def reloads(url: str, outcome: str) -> float:
    lines = httpx.get(f"{url}/metrics", timeout=600).text.splitlines()
    name = f'safevlm_gateway_reloads_total{{outcome="{outcome}"'
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def wait_for(url: str, outcome: str, count: int) -> None:
    until = time.monotonic() + 600
    while reloads(url, outcome) < count:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_new_bundle_loses_no_request_and_a_broken_one_changes_nothing(
    bundle: Path, upstream: Upstream, tmp_path: Path
) -> None:
    folder = tmp_path / "guard"
    lenient = with_block_at(bundle, folder, 1.0)
    served = ["--bundle", str(folder), "--upstream", upstream.url, "--policy", str(tmp_path / "policy.json")]
    (tmp_path / "policy.json").write_text(json.dumps({"still_unsure": "allow"}))
    with gateway(*served) as (process, url):
        assert ask(url) == ("allow", lenient)
        stop, answers = threading.Event(), list[tuple[str, str]]()

        def keep_asking(_: int) -> None:
            while not stop.is_set():
                answers.append(ask(url))

        with ThreadPoolExecutor(4) as clients:
            asking = clients.map(keep_asking, range(4))
            strict = with_block_at(bundle, folder, 1e-9)
            process.send_signal(signal.SIGHUP)
            wait_for(url, "done", 1)
            assert ask(url) == ("block", strict)
            (folder / "manifest.json").write_text("{}")
            process.send_signal(signal.SIGHUP)
            wait_for(url, "failed", 1)
            assert ask(url) == ("block", strict)
            stop.set()
            list(asking)
        assert set(answers) <= {("allow", lenient), ("block", strict)}, "no verdict of one with the hash of another"
        process.send_signal(signal.SIGTERM)
        assert process.wait(600) == 0
        assert process.stderr is not None
        told = process.stderr.read()
    assert "not reloaded" in told and "reloaded: bundle" in told


def test_a_signal_for_a_model_in_this_process_changes_nothing(bundle: Path, upstream: Upstream) -> None:
    from runtimes.gateway.app import Gateway

    gate = Gateway.open(bundle, upstream=upstream.url)
    with pytest.raises(Exception, match="start it again"):
        gate.renewed()
