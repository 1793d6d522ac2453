"""SIGHUP: a new bundle without a lost request, and each verdict with the guard that gave it."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from runtimes.gateway.serving.clients import digest_of
from runtimes.guard.bundle import open_bundle
from safevlm.contract.manifest import Manifest
from tests.runtimes.bundles import fitted
from tests.runtimes.gateway.servers import SAFE_URL, Upstream, answer, messages
from tests.runtimes.gateway.test_command import ROOT, gateway


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
    assert "reload failed" in told and "reloaded: bundle" in told


def test_a_signal_for_a_model_in_this_process_changes_nothing(bundle: Path, upstream: Upstream) -> None:
    from runtimes.gateway.app import Gateway

    gate = Gateway.open(bundle, upstream=upstream.url)
    with pytest.raises(Exception, match="Restart it"):
        gate.renewed()


def test_a_signal_during_the_start_is_heeded_after_it(bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as upstream:
        command = [sys.executable, "-m", "runtimes.gateway", "--port", "0", "--bundle", str(bundle)]
        command += ["--upstream", f"http://127.0.0.1:{upstream.getsockname()[1]}/v1"]
        with subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        ) as process:
            asked, _ = upstream.accept()  # whether it speaks HTTP: nothing is served yet
            process.send_signal(signal.SIGHUP)
            asked.close()
            assert process.stderr is not None
            told = [process.stderr.readline() for _ in range(3)]
            process.send_signal(signal.SIGTERM)
            assert process.wait(600) == 0, told
    assert [line.split()[0] for line in told] == ["--upstream", "serving", "reloaded:"]


def test_many_signals_are_one_reload_or_two_and_none_disturbs_the_end(bundle: Path, upstream: Upstream) -> None:
    begun, release = threading.Event(), threading.Event()

    def slow(handler: Any, body: Any) -> None:
        begun.set()
        release.wait(600)
        answer(handler, body)

    with gateway("--bundle", str(bundle), "--upstream", upstream.url) as (process, url):
        process.send_signal(signal.SIGSTOP)
        for _ in range(100):
            process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGCONT)
        wait_for(url, "done", 1)
        upstream.behave = slow
        with ThreadPoolExecutor(1) as thread:
            asked = thread.submit(ask, url)
            assert begun.wait(600)
            for number in (signal.SIGHUP, signal.SIGTERM, *[signal.SIGHUP] * 20):
                process.send_signal(number)
                time.sleep(0.02)
            release.set()
            assert asked.result()[0] in ("allow", "block")
        while process.poll() is None:
            process.send_signal(signal.SIGHUP)
            time.sleep(0.01)
        assert process.stderr is not None
        told = process.stderr.read()
    assert process.returncode == 0 and "Traceback" not in told, told
    assert told.count("reloaded: bundle") < 10, "one at a time, and one for all that came meanwhile"


def test_new_keys_are_taken_over_and_limits_are_counted_on(bundle: Path, upstream: Upstream, tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.toml" for name in ("clients", "key")}

    def write(upstream_key: str, *names: str) -> None:
        entry = '[[client]]\nname = "{}"\nkey_sha256 = "{}"\nrequests_per_minute = 1\n'
        files["clients"].write_text("\n".join(entry.format(name, digest_of(f"sk-{name}")) for name in names))
        files["key"].write_text(upstream_key)
        for each in files.values():
            each.chmod(0o600)

    def status(name: str) -> int:
        headers = {"authorization": f"Bearer sk-{name}"}
        body = {"messages": messages(SAFE_URL)}
        return httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers).status_code

    write("sk-one", "old", "kept")
    served = ["--bundle", str(bundle), "--upstream", upstream.url]
    keys = ["--client-keys", str(files["clients"]), "--upstream-key-file", str(files["key"])]
    with gateway(*served, *keys) as (process, url):
        assert [status(each) for each in ("kept", "kept", "new")] == [200, 429, 401]
        write("sk-two", "kept", "new")
        process.send_signal(signal.SIGHUP)
        wait_for(url, "done", 1)
        assert [status(each) for each in ("old", "kept", "new")] == [401, 429, 200]
        files["key"].chmod(0o644)
        process.send_signal(signal.SIGHUP)
        wait_for(url, "failed", 1)
    assert [each["authorization"] for each in upstream.headers_seen] == ["Bearer sk-one", "Bearer sk-two"]
