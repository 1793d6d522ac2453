"""The OpenAPI document describes every route, and what an outsider makes of it is taken and answered as it says."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from runtimes.gateway.app import Gateway, create_app
from runtimes.gateway.options import GatewayOptions
from tests.runtimes.gateway.servers import SAFE, SAFE_URL, UNSAFE, Upstream, data_url, messages, png, serving

ROOT = Path(__file__).parents[4]
OUTSIDER = ROOT / ".venv-clients" / "bin" / "schemathesis"


def test_every_route_is_described(address: str, bundle: Path) -> None:
    document = httpx.get(f"{address}/openapi.json").json()
    app = create_app(Gateway.open(bundle, upstream="http://127.0.0.1:9/v1"))
    served = {(route.path.replace("{name:path}", "{id}"), *route.methods) for route in app.routes}  # type: ignore[attr-defined]
    described = {(path, method.upper()) for path, methods in document["paths"].items() for method in methods}
    assert described == served


def test_references_lead_somewhere(address: str) -> None:
    text = httpx.get(f"{address}/openapi.json").text
    schemas = json.loads(text)["components"]["schemas"]
    named = {each.split('"')[0] for each in text.split('"#/components/schemas/')[1:]}
    assert named <= schemas.keys()
    assert {"Chat", "Responses", "Guard", "Error"} <= named


@pytest.mark.parametrize("key", [None, "sk-page"])
def test_a_key_is_asked_for_where_the_document_says_so(bundle: Path, upstream: Upstream, key: str | None) -> None:
    options = GatewayOptions(pass_keys=frozenset({"guided_json"}))
    with serving(Gateway.open(bundle, upstream=upstream.url, client_key=key, options=options)) as url:
        document: dict[str, Any] = httpx.get(f"{url}/openapi.json").json()
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                found = httpx.request(method, url + path)
                assert (found.status_code == 401) == ("security" in operation), path
        body = {"messages": messages(SAFE_URL), "guided_json": {}}
        found = httpx.post(f"{url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"})
        assert found.status_code == 200
    schemas = document["components"]["schemas"]
    assert "guided_json" in schemas["Chat"]["properties"] and "guided_json" in schemas["Responses"]["properties"]


def test_an_outsider_finds_nothing_that_is_not_described(bundle: Path, upstream: Upstream, tmp_path: Path) -> None:
    """Schemathesis: what the schemas allow is taken, what they forbid is refused, and answers are as described."""
    if not OUTSIDER.exists():
        pytest.skip("no .venv-clients; make peers")
    hooks = tmp_path / "hooks.py"
    images = [data_url(png(each.resize((16, 16)))) for each in (SAFE, UNSAFE)]
    hooks.write_text(
        "import schemathesis\nfrom hypothesis import strategies as st\n"
        f"schemathesis.openapi.format('image-url', st.sampled_from({images!r}))\n"
    )
    options = GatewayOptions(max_images=1000)
    with serving(Gateway.open(bundle, upstream=upstream.url, options=options)) as url:
        command = [str(OUTSIDER), "run", f"{url}/openapi.json", "--generation-deterministic", "--no-color"]
        command += ["--max-examples", "10", "--phases", "fuzzing", "--request-timeout", "600", "--continue-on-failure"]
        done = subprocess.run(
            command,
            env={**os.environ, "SCHEMATHESIS_HOOKS": str(hooks)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " tested" in done.stdout.lower() or "Tested: 8" in done.stdout
