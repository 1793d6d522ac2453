"""Clients' keys: who may ask, how often, and that a key stands nowhere."""

from __future__ import annotations

import logging
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from runtimes.gateway.app import Gateway
from runtimes.gateway.keys import main
from runtimes.gateway.refusal import Refusal
from runtimes.gateway.serving.clients import Client, ClientEntry, Clients, digest_of, read_clients
from runtimes.gateway.serving.private_file import read_key_file
from safevlm.errors import InputError
from tests.runtimes.gateway.servers import SAFE_URL, Upstream, messages, serving

KEYS = {"shop": "sk-shop-secret", "app": "sk-app-secret"}


class Clock:
    """Seconds that a test counts."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def entry(name: str, **limits: int) -> ClientEntry:
    return ClientEntry(name=name, key_sha256=digest_of(KEYS[name]), **limits)


def test_a_minutes_limit_refills_evenly() -> None:
    clock = Clock()
    client = Client(entry("shop", requests_per_minute=6, images_per_minute=12), clock)
    for _ in range(6):
        client.take("requests")
    with pytest.raises(Refusal) as refused:
        client.take("requests")
    assert (refused.value.status, refused.value.code) == (429, "rate_limit_exceeded")
    assert refused.value.headers["Retry-After"] == "10" and refused.value.headers["x-ratelimit-limit-requests"] == "6"
    client.take("images", 12)  # a limit of its own
    clock.now += 9.9
    with pytest.raises(Refusal):
        client.take("requests")
    clock.now += 0.1
    client.take("requests")
    clock.now += 1_000_000
    for _ in range(6):
        client.take("requests")
    with pytest.raises(Refusal):
        client.take("requests")


def test_more_images_than_a_minute_has_are_refused_for_good() -> None:
    client = Client(entry("shop", images_per_minute=2), Clock())
    with pytest.raises(Refusal, match="waiting does not help") as refused:
        client.take("images", 3)
    assert "Retry-After" not in refused.value.headers and refused.value.headers["x-should-retry"] == "false"
    client.take("images", 2)


@pytest.mark.parametrize(
    "shown",
    ["", "Bearer", "Bearer ", "Bearer sk-other", f"Basic {KEYS['shop']}", KEYS["shop"], f"Bearer {KEYS['shop']}x"],
)
def test_nobody_else_may_ask(shown: str) -> None:
    clients = Clients([entry("shop"), entry("app")])
    assert clients.find(f"Bearer {KEYS['app']}").name == "app"
    with pytest.raises(Refusal) as refused:
        clients.find(shown)
    assert (refused.value.status, refused.value.code) == (401, "invalid_api_key")


def test_each_client_has_its_own_limits(bundle: Path, upstream: Upstream, caplog: pytest.LogCaptureFixture) -> None:
    clients = Clients([entry("shop", requests_per_minute=2, images_per_minute=1), entry("app")])
    gateway = Gateway.open(bundle, upstream=upstream.url)
    object.__setattr__(gateway, "clients", clients)

    def ask(name: str, images: int = 1) -> httpx.Response:
        parts = messages(*[SAFE_URL] * images)
        headers = {"authorization": f"Bearer {KEYS[name]}"}
        return httpx.post(f"{url}/v1/chat/completions", json={"messages": parts}, headers=headers, timeout=600)

    with caplog.at_level(logging.DEBUG), serving(gateway) as url:
        statuses = [ask("shop").status_code, ask("shop").status_code, ask("shop").status_code, ask("app").status_code]
        assert statuses == [200, 429, 429, 200]
        assert ask("shop").json()["error"]["code"] == "rate_limit_exceeded"
        assert httpx.get(f"{url}/v1/models").status_code == 401
        counted = httpx.get(f"{url}/metrics").text
    assert 'client="shop",outcome="allowed"} 1.0' in counted and 'client="app"' in counted
    assert all("authorization" not in headers for headers in upstream.headers_seen), "keys are for this server"
    for key in KEYS.values():
        assert key not in caplog.text and key not in counted and digest_of(key) not in caplog.text


def test_the_command_makes_what_the_gateway_reads(tmp_path: Path) -> None:
    made = CliRunner().invoke(main, ["shop", "--requests-per-minute", "60"], catch_exceptions=False)
    key = made.stderr.split()[-1]
    path = tmp_path / "clients.toml"
    path.write_text(made.stdout)
    path.chmod(0o640)
    assert read_clients(path).find(f"Bearer {key}").name == "shop" and key not in made.stdout
    assert CliRunner().invoke(main, ["no name"]).exception is not None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "client"),
        ("client = []", "client"),
        ('[[client]]\nname = "a"', "key_sha256"),
        (f'[[client]]\nname = "a"\nkey_sha256 = "{"0" * 63}"', "key_sha256"),
        (f'[[client]]\nname = "a b"\nkey_sha256 = "{"0" * 64}"', "name"),
        (f'[[client]]\nname = "a"\nkey_sha256 = "{"0" * 64}"\nrequests_per_minute = 0', "requests_per_minute"),
        (f'[[client]]\nname = "a"\nkey_sha256 = "{"0" * 64}"\nkey = "sk-1"', "key"),
        (f'[[client]]\nname = "a"\nkey_sha256 = "{"0" * 64}"\n' * 2, "two clients have the name a"),
        (
            "".join(f'[[client]]\nname = "{name}"\nkey_sha256 = "{"0" * 64}"\n' for name in "ab"),
            "clients a and b have the same key",
        ),
    ],
)
def test_a_file_that_is_wrong_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "clients.toml"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(InputError, match=said):
        read_clients(path)


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o602])
def test_a_file_that_everybody_reads_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "clients.toml"
    path.write_text(f'[[client]]\nname = "a"\nkey_sha256 = "{"0" * 64}"\n')
    path.chmod(mode)
    with pytest.raises(InputError, match="chmod 600"):
        read_clients(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("sk-secret two", "holds spaces"),
        ("sk-secret\nsk-secret", "several lines"),
    ],
)
def test_a_key_file_holds_one_key_which_no_error_quotes(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "key"
    path.write_text("sk-secret\n")
    path.chmod(0o440)
    assert read_key_file(path) == "sk-secret"
    path.chmod(0o644)
    with pytest.raises(InputError, match="chmod 600"):
        read_key_file(path)
    path.chmod(0o600)
    path.write_text(content)
    with pytest.raises(InputError, match=said) as refused:
        read_key_file(path)
    assert "secret" not in str(refused.value)
    with pytest.raises(InputError, match="cannot be read"):
        read_key_file(tmp_path)
