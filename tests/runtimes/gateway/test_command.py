"""The command as a process: it starts, logs, ends in good order."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from runtimes.gateway.__main__ import main
from runtimes.gateway.serving.serving import listening
from safevlm.errors import InputError
from safevlm.terminal.commandline import run
from tests.runtimes.bundles import write_bundle
from tests.runtimes.gateway.servers import ANSWER, SAFE_URL, Upstream, answer, messages, piece

ROOT = Path(__file__).parents[3]


@contextmanager
def gateway(
    *arguments: str, program: tuple[str, ...] = ("-m", "runtimes.gateway"), first: str = ""
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, *program, "--port", "0", *arguments]
    paths = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=paths, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert not first or process.stderr.readline() == first
        line = process.stderr.readline()
        assert line.startswith("serving on "), line + process.stderr.read()
        url = line.removeprefix("serving on ").strip()
        until = time.monotonic() + 600
        while True:
            try:
                httpx.get(f"{url}/healthz", timeout=600)
                break
            except httpx.HTTPError:
                assert time.monotonic() < until and process.poll() is None
                time.sleep(0.05)
        yield process, url
    finally:
        process.kill()
        process.communicate()


def test_sigterm_lets_what_is_served_end(bundle: Path, upstream: Upstream) -> None:
    begun, release = threading.Event(), threading.Event()

    def slow(handler: Any, _: Any) -> None:
        handler.begin_stream()
        handler.event(piece("The "))
        begun.set()
        release.wait(600)
        handler.event(piece(ANSWER[4:], "stop"))
        handler.event(b"[DONE]")
        handler.close_connection = True

    upstream.behave = slow
    with gateway("--bundle", str(bundle), "--upstream", upstream.url) as (process, url):
        found: list[str] = []

        def ask() -> None:
            body = {"messages": messages(SAFE_URL, text="private words"), "stream": True}
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=600) as response:
                found.extend(response.iter_lines())

        thread = threading.Thread(target=ask)
        thread.start()
        assert begun.wait(600)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        release.set()
        thread.join(600)
        out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert found[-1] == "" and "data: [DONE]" in found
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["outcome"] for line in lines if line["path"] == "/v1/chat/completions"] == ["allowed"]
    assert "private" not in out + err


def test_a_model_in_the_same_process_and_keys_from_the_environment(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATE_KEY", "sk-clients-must-show")
    with gateway("--bundle", str(bundle), "--model", "tiny-safegem", "--api-key-env", "GATE_KEY") as (process, url):
        body = {"messages": messages(SAFE_URL), "max_tokens": 8}
        assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 401
        headers = {"Authorization": "Bearer sk-clients-must-show"}
        found = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=600)
        assert found.status_code == 200 and found.json()["choices"][0]["message"]["content"]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=600)
    assert process.returncode == 0 and "sk-clients" not in out + err


def test_random_weights_are_told_before_anything_is_served(bundle: Path, upstream: Upstream, tmp_path: Path) -> None:
    copy = tmp_path / "guard"
    shutil.copytree(bundle, copy)
    stated = json.loads((copy / "manifest.json").read_text())
    stated["source"]["random_weights"] = True
    (copy / "manifest.json").write_text(json.dumps(stated))
    said = f"warning: the guard in {copy} has random weights: its verdicts mean nothing\n"
    with gateway("--bundle", str(copy), "--upstream", upstream.url, first=said) as (process, _):
        process.send_signal(signal.SIGTERM)
        assert process.wait(600) == 0


def test_what_was_accepted_before_the_end_is_finished_or_told(bundle: Path, upstream: Upstream) -> None:
    begun, release = threading.Event(), threading.Event()

    def slow(handler: Any, body: Any) -> None:
        begun.set()
        release.wait(600)
        answer(handler, body)

    upstream.behave = slow
    body = json.dumps({"messages": messages(SAFE_URL)}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(body)
    with ExitStack() as opened, gateway("--bundle", str(bundle), "--upstream", upstream.url) as (process, url):
        host, port = url.removeprefix("http://").split(":")

        def connected() -> socket.socket:
            return opened.enter_context(socket.create_connection((host, int(port)), 600))

        served, half = connected(), connected()
        served.sendall(head + body)
        half.sendall(b"GET /healthz HTTP/1.1\r\n")
        assert begun.wait(600)
        process.send_signal(signal.SIGSTOP)  # what comes now waits in the socket's queue
        queued = [connected() for _ in range(30)]
        for each in queued:
            each.sendall(head + body)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        found = received(half)
        assert found.startswith(b"HTTP/1.1 503") and b"shutting_down" in found and b"retry-after: 1" in found.lower()
        release.set()
        for each in (served, *queued):  # some of the queued ones were begun before the signal was seen
            found = received(each)
            assert found.startswith(b"HTTP/1.1 200") or (each is not served and b"shutting_down" in found), found
            assert b"connection: close" in found.lower()
        assert process.wait(600) == 0


def received(client: socket.socket) -> bytes:
    with client:
        return b"".join(iter(lambda: client.recv(65536), b""))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_what_is_not_done_in_time_is_told(bundle: Path, upstream: Upstream, stream: bool) -> None:
    begun, release = threading.Event(), threading.Event()

    def hang(handler: Any, body: Any) -> None:
        if stream:
            handler.begin_stream()
            handler.event(piece("The "))
        begun.set()
        release.wait(600)
        handler.close_connection = True

    upstream.behave = hang
    more = ("--bundle", str(bundle), "--upstream", upstream.url, "--shutdown-timeout", "1")
    with gateway(*more) as (process, url):
        body = {"messages": messages(SAFE_URL), "stream": stream}
        with ThreadPoolExecutor(1) as thread:
            found = thread.submit(httpx.post, f"{url}/v1/chat/completions", json=body, timeout=600)
            assert begun.wait(600)
            process.send_signal(signal.SIGTERM)
            answered = found.result()
        _, err = process.communicate(timeout=600)
        release.set()
    assert process.returncode == 0 and "Traceback" not in err, err
    assert answered.status_code == (200 if stream else 503)
    told = answered.text.strip().split("data: ")[-1] if stream else answered.text
    assert json.loads(told)["error"]["code"] == "shutting_down"


def test_a_second_signal_ends_at_once(bundle: Path, upstream: Upstream) -> None:
    begun, release = threading.Event(), threading.Event()

    def hang(handler: Any, _: Any) -> None:
        begun.set()
        release.wait(600)
        handler.close_connection = True

    upstream.behave = hang
    more = ("--bundle", str(bundle), "--upstream", upstream.url, "--shutdown-timeout", "100000")
    with gateway(*more) as (process, url), ThreadPoolExecutor(1) as thread:
        body = {"messages": messages(SAFE_URL)}
        thread.submit(httpx.post, f"{url}/v1/chat/completions", json=body, timeout=600)
        assert begun.wait(600)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(ConnectionError):  # the first one has been seen: the port is closed
            while True:
                socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))).close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(600) == 0
        release.set()


def test_a_log_that_nobody_reads_holds_up_nobody(bundle: Path, upstream: Upstream) -> None:
    with gateway("--bundle", str(bundle), "--upstream", upstream.url) as (process, url), httpx.Client() as client:
        for _ in range(600):  # lines of about 200 bytes, into a pipe of 64 KiB
            assert client.get(f"{url}/healthz" if _ % 100 == 0 else f"{url}/v1/none", timeout=600).status_code
        process.send_signal(signal.SIGTERM)
        assert process.wait(600) == 0


def test_an_upstream_that_speaks_no_http_is_refused(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def greet() -> None:
            client, _ = other.accept()
            with client:
                client.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
                client.recv(65536)

        thread = threading.Thread(target=greet)
        thread.start()
        url = f"http://127.0.0.1:{other.getsockname()[1]}/v1"
        with pytest.raises(SystemExit) as ended:
            run(main, ["--bundle", str(bundle), "--upstream", url])
        thread.join(600)
    assert ended.value.code == 2
    assert "does not speak HTTP" in capsys.readouterr().err


HANGING = """
import sys, threading
from safevlm.terminal.commandline import run
from runtimes.gateway.__main__ import main
from runtimes.language.torch_language import TorchLanguageRunner

def hang(self, handle, max_new_tokens, writing):
    yield "The "
    threading.Event().wait()

TorchLanguageRunner._stream = hang
run(main, sys.argv[1:])
"""


def test_a_model_that_hangs_keeps_no_server_from_ending(bundle: Path, tmp_path: Path) -> None:
    script = tmp_path / "hanging.py"
    script.write_text(HANGING)
    more = ("--bundle", str(bundle), "--model", "tiny-safegem", "--shutdown-timeout", "1")
    with gateway(*more, program=(str(script),)) as (process, url):
        body = {"messages": messages(SAFE_URL), "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=600) as response:
            lines = response.iter_lines()
            assert "The " in next(lines)
            process.send_signal(signal.SIGTERM)
            told = [line for line in lines if line]
            assert json.loads(told[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
        out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert '"outcome": "cut_off"' in out and "still running" in err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "nothing to serve"),
        (["--bundle", "BUNDLE", "--upstream", "ftp://x"], "http(s) address"),
        (["--bundle", "BUNDLE", "--upstream", "http://x", "--model", "tiny-safegem"], "excludes --model"),
        (["--bundle", "BUNDLE", "--upstream", "http://x", "--api-key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY is not set"),
        (["--bundle", "no such folder", "--upstream", "http://x"], "not a guard bundle"),
    ],
)
def test_what_cannot_be_served_is_refused(
    arguments: list[str], word: str, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "NO_SUCH_KEY" not in os.environ
    with pytest.raises(SystemExit) as ended:
        run(main, [str(bundle) if each == "BUNDLE" else each for each in arguments])
    assert ended.value.code == 2
    assert word in capsys.readouterr().err


def test_what_fails_when_it_is_loaded_is_refused_without_a_traceback(tmp_path: Path) -> None:
    """The classes of guard and language model are compared when both are there, in the server's own start."""
    command = [
        "-m",
        "runtimes.gateway",
        "--bundle",
        str(write_bundle(tmp_path)),
        "--model",
        "tiny-safegem",
        "--port",
        "0",
    ]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and "error: guard and language model have different classes" in done.stderr
    assert "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize(("host", "reason"), [("127.0.0.1", "Address already in use"), ("256.0.0.1", "")])
def test_a_port_in_use_or_an_address_of_another_machine_is_refused(host: str, reason: str) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        pytest.raises(InputError, match=rf"listen on --host {host} --port \d+: .*{reason}.*0: any free one"),
    ):
        listening(host, other.getsockname()[1])
