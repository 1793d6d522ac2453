"""Drives a headless Chromium through its debugging pipe: no driver, no port, no network.

Not Playwright, whose package brings a Node runtime and expects browsers of its own to be downloaded: the tests need
three calls of the browser that the machine has.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["BINARY", "Chromium"]

BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
START = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""The browser reads from descriptor 3 and writes to 4: this puts ours there."""
SECONDS = 600.0
"""Longest wait for an answer: a machine that is busy otherwise starts a browser slowly."""


class Chromium:
    """One tab; ``complaints`` gathers console errors, exceptions, refused resources. A context manager."""

    def __init__(self, profile: Path) -> None:
        assert BINARY is not None
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._number = 0
        self._rest = b""
        their_in, self._out = os.pipe()
        self._in, their_out = os.pipe()
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                START,
                str(their_in),
                str(their_out),
                BINARY,
                *FLAGS,
                f"--user-data-dir={profile}",
                "about:blank",
            ],
            pass_fds=(their_in, their_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(their_in)
        os.close(their_out)
        self._session: str | None = None
        self._loaded = False

    def __enter__(self) -> Chromium:
        try:
            self._attach()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _attach(self) -> None:
        deadline = time.monotonic() + SECONDS
        while not (tabs := [t for t in self._send("Target.getTargets")["targetInfos"] if t["type"] == "page"]):
            assert time.monotonic() < deadline, "no tab was opened"
            time.sleep(0.1)
        attached = self._send("Target.attachToTarget", {"targetId": tabs[0]["targetId"], "flatten": True})
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._send(f"{domain}.enable")

    def _close(self) -> None:
        self._process.terminate()
        self._process.wait(SECONDS)
        os.close(self._out)
        os.close(self._in)

    def show(self, page: Path, *, width: int, height: int, dark: bool = False, scripts: bool = True) -> None:
        """Open a page in a window of this size, and wait until it is loaded."""
        self.complaints.clear()
        self.requests.clear()
        self._send("Emulation.setScriptExecutionDisabled", {"value": not scripts})
        self.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._send("Emulation.setEmulatedMedia", {"features": [scheme]})
        self._loaded = False
        self._send("Page.navigate", {"url": page.resolve().as_uri()})
        deadline = time.monotonic() + SECONDS
        while not self._loaded:
            assert time.monotonic() < deadline, f"{page} was not loaded"
            self._read(deadline)

    def resize(self, width: int, height: int) -> None:
        """Give the window a size, in CSS pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._send("Emulation.setDeviceMetricsOverride", size)

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        found = self._send("Runtime.evaluate", {"expression": expression, "returnByValue": True, "awaitPromise": True})
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str, *, code: int, text: str = "") -> None:
        """Press and let go of a key; ``code`` is its virtual key code."""
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self._send("Input.dispatchKeyEvent", {"type": "keyDown" if text else "rawKeyDown", "text": text, **common})
        self._send("Input.dispatchKeyEvent", {"type": "keyUp", **common})

    def write(self, text: str) -> None:
        """Write into what has the focus."""
        self._send("Input.insertText", {"text": text})

    def settle(self) -> None:
        """Wait until the page has been drawn as it now is, and once more with what that drawing changed."""
        for _ in range(2):
            self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def screenshot(self) -> bytes:
        """Return what the window shows, as PNG."""
        self.settle()
        return base64.b64decode(self._send("Page.captureScreenshot", {"format": "png"})["data"])

    def pdf(self) -> bytes:
        """Return the page as it is printed on A4, with backgrounds."""
        paper = {"paperWidth": 8.27, "paperHeight": 11.69, "printBackground": True}
        return base64.b64decode(self._send("Page.printToPDF", paper)["data"])

    def download(self, expression: str, folder: Path, name: str) -> bytes:
        """Return the file ``name`` that a JavaScript expression makes the page save; ``folder`` is where it goes."""
        self._send("Page.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})
        self.evaluate(expression)
        deadline = time.monotonic() + SECONDS
        while not (folder / name).exists():  # under its own name only when it is whole
            assert time.monotonic() < deadline, f"{name} was not saved"
            time.sleep(0.05)
        return (folder / name).read_bytes()

    def _send(self, method: str, parameters: Mapping[str, Any] | None = None) -> Any:
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": dict(parameters or {})}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + SECONDS
        while True:
            answer = self._read(deadline)
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _read(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(deadline - time.monotonic(), 0))
            assert ready, "the browser does not answer"
            data = os.read(self._in, 1 << 20)
            assert data, "the browser ended"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method: str | None, told: Mapping[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(told["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(told["args"]))
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.complaints.append(told["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
