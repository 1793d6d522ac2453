"""What the files of deploy/ say, as data."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
TOOLS = ROOT / ".venv-deploy" / "bin"
GATEWAY = ["python", "-m", "runtimes.gateway"]
GIVEN = {"SAFEVLM_CLIENT_KEY": "sk-key", "BUNDLE": "./bundle", "MODELS": "./models"}
"""What compose.yaml takes from its environment and has no default for."""


def tool(name: str) -> str:
    """Return the path of a tool of .venv-deploy; skip the test where it is missing."""
    path = TOOLS / name
    if not path.exists():
        pytest.skip(f"no {name} in .venv-deploy; make peers")
    return str(path)


def dockerfile() -> list[tuple[str, str]]:
    """Return the instructions and their arguments, continued lines joined."""
    lines = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ").splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.strip().partition(" ") for line in lines if line.strip())]


def instruction(name: str) -> str:
    """Return the arguments of the last instruction of a name."""
    return [rest for found, rest in dockerfile() if found == name][-1]


def interpolated(text: str, given: dict[str, str]) -> str:
    """Put in variables as docker compose does: ``${NAME:-default}`` and ``${NAME:?why it is needed}``."""

    def value(match: re.Match[str]) -> str:
        if given.get(match["name"]):
            return given[match["name"]]
        assert match["sign"] == "-", f"{match['name']}: {match['rest']}"
        return match["rest"]

    return re.sub(r"\$\{(?P<name>\w+):(?P<sign>[-?])(?P<rest>[^}]*)\}", value, text)


def compose_text() -> str:
    return interpolated((DEPLOY / "compose.yaml").read_text(), GIVEN)


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load(compose_text())["services"]
    return found


def networks() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load(compose_text())["networks"]
    return found


def unit() -> list[tuple[str, str]]:
    """Return the settings of the systemd unit."""
    lines = (DEPLOY / "safevlm-gateway.service").read_text().replace("\\\n", " ").splitlines()
    split = (line.partition("=") for line in lines if line and line[0] not in "#[")
    return [(name, " ".join(value.split())) for name, _, value in split]


def manifests(kind: str) -> dict[str, dict[str, Any]]:
    """Return the Kubernetes objects of a kind by name."""
    found = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    return {each["metadata"]["name"]: each for each in found if each["kind"] == kind}


def container(name: str) -> dict[str, Any]:
    """Return the only container of a Deployment."""
    (found,) = manifests("Deployment")[name]["spec"]["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def commands() -> dict[str, list[str]]:
    """Return what each file runs for the gateway: the whole command."""
    entry = json.loads(instruction("ENTRYPOINT"))
    return {
        "Dockerfile": [*entry, *json.loads(instruction("CMD"))],
        "compose.yaml": [*entry, *services()["gateway"]["command"]],
        "safevlm-gateway.service": shlex.split(dict(unit())["ExecStart"]),
        "kubernetes.yaml": [*entry, *container("gateway")["args"]],
    }
