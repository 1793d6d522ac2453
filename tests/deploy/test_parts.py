"""The files of deploy/ fit each other and the program: options, ports, paths, names, versions, what is copied."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from models.version import VERSION
from runtimes.gateway.__main__ import main
from runtimes.gateway.serving import PATHS
from tests.deploy.parts import (
    DEPLOY,
    GATEWAY,
    GIVEN,
    ROOT,
    commands,
    container,
    dockerfile,
    instruction,
    manifests,
    networks,
    services,
    unit,
)

FILES = ("Dockerfile", "compose.yaml", "safevlm-gateway.service", "kubernetes.yaml")


def parameters(name: str) -> dict[str, Any]:
    """Return what the gateway's own command line makes of a file's command."""
    command = commands()[name]
    assert [Path(command[0]).name, *command[1:3]] == GATEWAY
    return main.make_context("gateway", command[3:]).params


@pytest.mark.parametrize("name", FILES)
def test_the_gateways_command_line_takes_what_each_file_gives(name: str) -> None:
    given = parameters(name)
    assert given["bundle"].is_absolute() and given["upstream"] and given["port"] == 8080
    assert given["upstream_kind"] == "llama-server", "text that it does not read as an image need not be refused"
    assert (given["host"] == "127.0.0.1") == name.endswith(".service")
    assert given["show_probabilities"] is False


def test_a_client_key_is_asked_for_wherever_others_can_reach_the_gateway() -> None:
    for name in FILES[1:]:
        assert parameters(name)["api_key_env"] == "SAFEVLM_CLIENT_KEY"
    assert "SAFEVLM_CLIENT_KEY" in services()["gateway"]["environment"]
    assert [each["name"] for each in container("gateway")["env"]] == ["SAFEVLM_CLIENT_KEY"]
    assert "EnvironmentFile" in dict(unit())


def test_the_bundle_lies_where_the_gateway_looks_for_it_and_cannot_be_changed() -> None:
    (bundle,) = services()["gateway"]["volumes"]
    places = {bundle["target"], str(parameters("compose.yaml")["bundle"]), str(parameters("Dockerfile")["bundle"])}
    assert len(places) == 1 and bundle["read_only"] is True
    mounts = {each["name"]: each for each in container("gateway")["volumeMounts"]}
    assert (
        mounts["bundle"]["mountPath"] == str(parameters("kubernetes.yaml")["bundle"]) and mounts["bundle"]["readOnly"]
    )
    assert set(manifests("PersistentVolumeClaim")) == {"bundle", "models"}


def test_the_upstream_is_the_llama_server_of_the_same_file() -> None:
    for name, command in (
        ("compose.yaml", services()["llama-server"]["command"]),
        ("kubernetes.yaml", container("llama-server")["args"]),
    ):
        upstream = urlsplit(parameters(name)["upstream"])
        assert upstream.hostname == "llama-server" and upstream.path == "/v1"
        assert command[command.index("--port") + 1] == str(upstream.port)
    assert manifests("Service")["llama-server"]["spec"]["ports"][0]["port"] == upstream.port


def test_the_proxy_passes_on_to_the_gateway_of_the_compose_file() -> None:
    caddyfile = (DEPLOY / "Caddyfile").read_text()
    assert f"{{$GATEWAY:gateway:{parameters('compose.yaml')['port']}}}" in caddyfile
    passed = re.search(r"@api path (.*)", caddyfile)
    assert passed is not None
    inner = {path for path in PATHS if not any(fnmatch.fnmatch(path, each) for each in passed[1].split())}
    assert inner == {"/metrics", "/healthz", "/readyz"}
    seconds = re.search(r"response_header_timeout (\d+)s", caddyfile)
    assert seconds is not None and int(seconds[1]) > parameters("compose.yaml")["total_timeout"]
    mebibytes = re.search(r"max_size (\d+)MiB", caddyfile)
    assert mebibytes is not None and int(mebibytes[1]) > parameters("compose.yaml")["max_body_mb"]


def test_nothing_but_the_gateway_reaches_the_model() -> None:
    """On a network of compose's, and by the network policies."""
    on = {name: set(each["networks"]) for name, each in services().items()}
    assert [name for name, its in on.items() if its & on["llama-server"]] == ["gateway", "llama-server"]
    assert [name for name, each in services().items() if "ports" in each] == ["caddy"]
    assert all(networks()[name] == {"internal": True} for name in on["gateway"] | on["llama-server"])
    policies = {name: each["spec"] for name, each in manifests("NetworkPolicy").items()}
    assert policies["nothing-else"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    gateway = {"podSelector": {"matchLabels": manifests("Deployment")["gateway"]["metadata"]["labels"]}}
    assert [each["from"] for each in policies["llama-server"]["ingress"]] == [[gateway]]
    model = {"podSelector": {"matchLabels": manifests("Deployment")["llama-server"]["metadata"]["labels"]}}
    assert policies["gateway"]["egress"][0]["to"] == [model] and "egress" not in policies["llama-server"]


def test_each_container_runs_with_as_few_rights_as_it_can() -> None:
    for name, service in services().items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"]
    assert services()["llama-server"]["user"].split(":")[0] != "0"
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", instruction("USER"))
    for name, deployment in manifests("Deployment").items():
        pod, inside = deployment["spec"]["template"]["spec"], container(name)["securityContext"]
        assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
        assert inside["readOnlyRootFilesystem"] and inside["capabilities"] == {"drop": ["ALL"]}
        assert inside["allowPrivilegeEscalation"] is False


def test_health_is_asked_of_paths_that_there_are() -> None:
    for probe, path in (("startupProbe", "/livez"), ("livenessProbe", "/livez"), ("readinessProbe", "/readyz")):
        assert container("gateway")[probe]["httpGet"]["path"] == path and path in PATHS
    assert f"'127.0.0.1', {instruction('EXPOSE')}, " in instruction("HEALTHCHECK")


def test_what_is_being_served_has_time_to_end() -> None:
    pod = manifests("Deployment")["gateway"]["spec"]["template"]["spec"]
    kubernetes = pod["terminationGracePeriodSeconds"] - container("gateway")["lifecycle"]["preStop"]["sleep"]["seconds"]
    compose = int(services()["gateway"]["stop_grace_period"].removesuffix("s"))
    for name, seconds in (
        ("kubernetes.yaml", kubernetes),
        ("compose.yaml", compose),
        ("safevlm-gateway.service", int(dict(unit())["TimeoutStopSec"])),
    ):
        assert seconds >= parameters(name)["shutdown_timeout"] + 5, name


def test_a_node_can_be_drained_and_a_gateway_stays() -> None:
    gateway, budget = manifests("Deployment")["gateway"]["spec"], manifests("PodDisruptionBudget")["gateway"]["spec"]
    assert gateway["replicas"] > budget["minAvailable"] >= 1 and budget["selector"] == gateway["selector"]
    for name, service in manifests("Service").items():
        assert service["spec"]["selector"] == manifests("Deployment")[name]["spec"]["selector"]["matchLabels"]


def test_images_are_pinned_and_the_gateways_is_of_this_version() -> None:
    assert all("@sha256:" in rest or rest.startswith("base ") for name, rest in dockerfile() if name == "FROM")
    images = {name: service["image"] for name, service in services().items()}
    assert "@sha256:" in images["caddy"] and re.search(r":server-b\d+$", images["llama-server"])
    assert images["gateway"] == container("gateway")["image"] == f"safevlm-gateway:{VERSION}"
    assert images["llama-server"] == container("llama-server")["image"]
    assert f'image.version="{VERSION}"' in instruction("LABEL")
    assert f"safevlm-gateway:{VERSION}" in (DEPLOY / "Dockerfile").read_text()


def context(into: Path) -> None:
    """Make the build's context: what .dockerignore lets through, which leaves out all that it does not name."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*" and lines[-1] == "**/__pycache__" and all(line[0] == "!" for line in lines[1:-1])
    for name in (line[1:] for line in lines[1:-1]):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, into / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, into / name)


def test_the_dockerfile_installs_a_gateway_from_a_clean_context(tmp_path: Path) -> None:
    """Its COPY lines and its pip line, without the dependencies, which are here already."""
    given, source, out = (tmp_path / name for name in ("context", "source", "out"))
    given.mkdir()
    source.mkdir()
    context(given)
    for name, rest in dockerfile():
        if name == "COPY" and not rest.startswith("--from"):
            *copied, target = rest.split()
            for each in copied:
                assert (given / each).exists(), f"{each} is copied, and not in the context"
                shutil.move(given / each, source / (each if target == "./" else target))
    assert not list(given.iterdir()), "in the context, and not copied"
    assert "--constraint constraints.txt '.[cpu,gateway]'" in instruction("RUN")
    assert all(f"\n{extra} = [" in (source / "pyproject.toml").read_text() for extra in ("cpu", "gateway"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(out)]
    subprocess.run([*pip, "."], cwd=source, check=True, timeout=600)
    here = {**os.environ, "PYTHONPATH": str(out)}
    told = subprocess.run(
        [sys.executable, "-m", "runtimes.gateway", "--help"],
        cwd=tmp_path, env=here, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert told.returncode == 0 and "--upstream-kind" in told.stdout, told.stderr
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.suffix in (".py", ".json")}
    assert {
        path.relative_to(source).as_posix()
        for folder in ("models", "runtimes")
        for path in (source / folder).rglob("*")
        if path.suffix in (".py", ".json")
    } <= found


def test_every_file_that_is_mounted_or_linked_is_there() -> None:
    bound = [each for service in services().values() for each in service["volumes"] if each["type"] == "bind"]
    assert {each["source"] for each in bound} == {"./Caddyfile", GIVEN["BUNDLE"], GIVEN["MODELS"]}
    assert all(each["read_only"] and each["bind"] == {"create_host_path": False} for each in bound), (
        "made where missing"
    )
    assert (DEPLOY / "Caddyfile").is_file()
    assert (ROOT / services()["gateway"]["build"]["dockerfile"]).is_file()
    readme = (DEPLOY / "README.md").read_text()
    for path in DEPLOY.iterdir():
        assert path.name == "README.md" or path.name in readme, f"deploy/README.md says nothing of {path.name}"
    for target in re.findall(r"\]\(([^)#]+)\)", readme):
        assert "://" in target or (DEPLOY / target).exists(), target


@pytest.mark.parametrize("status", [200, 503])
def test_the_health_check_asks_the_gateway_itself_whatever_proxies_are_set(status: int) -> None:
    """Docker sets those of its own configuration in every container."""

    class Livez(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/livez" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    command = json.loads(instruction("HEALTHCHECK").partition("CMD")[2])
    assert command[0] == "python"
    with HTTPServer(("127.0.0.1", 0), Livez) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        script = command[2].replace(instruction("EXPOSE"), str(server.server_address[1]))
        env = {**os.environ, "http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "no_proxy": ""}
        done = subprocess.run([sys.executable, command[1], script], env=env, timeout=600)
        if done.returncode != (status != 200):
            HTTPConnection(*server.server_address).request("GET", "/")  # let the thread end
        thread.join(600)
    assert done.returncode == (status != 200)
