"""Each file of deploy/ passes the tool that its kind has, and the tool finds a fault that is put in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.deploy.parts import DEPLOY, ROOT, compose_text, tool

EXPOSURE = 15
"""Tenths: the most that systemd may say of how exposed the unit is, of 100."""


def checked(*command: str, given: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=given, capture_output=True, text=True, check=False, timeout=600)


def dockerfile(text: str, _: Path) -> subprocess.CompletedProcess[str]:
    return checked(tool("hadolint"), "--failure-threshold", "style", "-", given=text)


def compose(text: str, _: Path) -> subprocess.CompletedProcess[str]:
    return checked(tool("python"), str(ROOT / "tests" / "peers" / "deploy.py"), "compose", given=text)


def caddyfile(text: str, place: Path) -> subprocess.CompletedProcess[str]:
    (place / "Caddyfile").write_text(text)
    here = {"XDG_DATA_HOME": str(place), "XDG_CONFIG_HOME": str(place), "PATH": os.environ["PATH"], "HOME": str(place)}
    for command in ("validate", "fmt"):
        arguments = ["--adapter", "caddyfile", "--config"] if command == "validate" else ["--diff"]
        done = subprocess.run(
            [tool("caddy"), command, *arguments, str(place / "Caddyfile")],
            env=here, capture_output=True, text=True, check=False, timeout=600,
        )  # fmt: skip
        if done.returncode:
            break
    return done


def kubernetes(text: str, place: Path) -> subprocess.CompletedProcess[str]:
    (place / "kubernetes.yaml").write_text(text)
    done = checked(tool("kubernetes-validate"), "--strict", str(place / "kubernetes.yaml"))
    if "WARN" in done.stdout + done.stderr:  # of a kind or version that it has no schema for
        done.returncode = 1
    return done


def systemd(text: str, place: Path) -> subprocess.CompletedProcess[str]:
    """Check the unit with this machine's Python, as it verifies that there is what it starts."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze")
    path = place / "safevlm-gateway.service"
    path.write_text(text.replace("/opt/safevlm/bin/python", sys.executable))
    verified = checked("systemd-analyze", "verify", "--man=no", str(path))
    if verified.returncode or verified.stderr:
        return subprocess.CompletedProcess(verified.args, 1, verified.stdout, verified.stderr)
    return checked("systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE}", str(path))


Check = Callable[[str, Path], "subprocess.CompletedProcess[str]"]
FILES: dict[str, tuple[Check, dict[str, tuple[str, str]]]] = {
    "Dockerfile": (
        dockerfile,
        {
            "no version": ("FROM python:3.13.14-slim-bookworm@sha256:", "FROM python #"),
            "a shell's CMD": ('CMD ["--bundle"', 'CMD --bundle"'),
        },
    ),
    "compose.yaml": (
        compose,
        {
            "an unknown key": ("mem_limit", "memory_limit"),
            "no such condition": ("service_healthy", "healthy"),
            "no port": ('"80:80"', '"80:eighty"'),
        },
    ),
    "Caddyfile": (caddyfile, {"an unknown directive": ("reverse_proxy", "proxy"), "spaces": ("\tadmin", "  admin")}),
    "kubernetes.yaml": (
        kubernetes,
        {
            "an unknown key": ("readOnlyRootFilesystem", "readOnlyRootFileSystem"),
            "no number": ("replicas: 2", "replicas: two"),
            "no such API": ("policy/v1", "policy/v0"),
        },
    ),
    "safevlm-gateway.service": (
        systemd,
        {
            "an unknown setting": ("ProtectHome=", "ProtectHomes="),
            "no such value": ("Type=exec", "Type=execute"),
            "root": ("DynamicUser=yes", "User=root"),
        },
    ),
}


def text_of(name: str) -> str:
    return compose_text() if name == "compose.yaml" else (DEPLOY / name).read_text()


@pytest.mark.parametrize("name", FILES)
def test_a_file_passes_its_own_tool(name: str, tmp_path: Path) -> None:
    done = FILES[name][0](text_of(name), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("name", "fault"), [(name, fault) for name, (_, faults) in FILES.items() for fault in faults])
def test_the_tool_finds_a_fault(name: str, fault: str, tmp_path: Path) -> None:
    check, faults = FILES[name]
    right, wrong = faults[fault]
    assert right in text_of(name)
    assert check(text_of(name).replace(right, wrong), tmp_path).returncode != 0
