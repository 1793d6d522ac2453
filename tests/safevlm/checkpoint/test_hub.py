"""What ``--model`` may be, and fetching through huggingface_hub from a stand-in server."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from safevlm.checkpoint.hub import KNOWN_CHECKPOINTS, MODELS_VARIABLE, TINY_CHECKPOINTS, HubCheckpoint, find_model
from safevlm.checkpoint.tap import MAX_SOURCE_BYTES
from safevlm.errors import CheckpointError, InputError
from tests.safevlm.checkpoint.folders import random_tensors, three_shards, write_folder
from tests.safevlm.checkpoint.hub_server import Repository, StandInHub, files_of, serve

FIRST, SECOND = "a" * 40, "b" * 40
HEAD_SHARD, VISION_SHARD, LANGUAGE_SHARD = (three_shards(name) for name in ("img_safety_head", "visual", "lm_head"))
LIGHT = {"config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"}
CODE = b"def f(self, x):\n    return self.img_safety_head(self.model(x).image_hidden_states.mean(1))\n"
SAFELLAVA = "etri-vilab/SafeLLaVA-7B"


def repository(folder: Path, layout: str = "original LLaVA", **kwargs: str | bool) -> Repository:
    """Two commits: the second, at ``main``, with code that names the tap and another head."""
    files = files_of(write_folder(folder / "first", layout, shard_of=three_shards))
    for name in sorted(LIGHT - files.keys()):
        files[name] = json.dumps({"file": name}).encode()  # the cache keeps equal contents once
    for name in ("pytorch_model.bin", "model.pt", "x.pth", "q4.gguf", "README.md", "sub/model.bin", "x.onnx"):
        files[name] = b"never"
    tensors = random_tensors(layout, seed=1)
    second = files | files_of(write_folder(folder / "second", layout, shard_of=three_shards, tensors=tensors))
    second |= {"modeling_safe.py": CODE, "huge.py": b"#" * (MAX_SOURCE_BYTES + 1)}
    return Repository(commits={FIRST: files, SECOND: second}, refs={"main": SECOND, "v1": FIRST}, **kwargs)  # type: ignore[arg-type]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[StandInHub]:
    single = {"config.json": b'{"hidden_size": 8}'}
    repositories = {
        SAFELLAVA: repository(tmp_path / "open"),
        "some/gated": repository(tmp_path / "gated", token="hf_right", gated=True),
        "some/private": repository(tmp_path / "private", token="hf_right"),
        "some/pickle": Repository(commits={FIRST: single | {"pytorch_model.bin": b"never"}}, refs={"main": FIRST}),
        "some/single": Repository(
            commits={FIRST: files_of(write_folder(tmp_path / "single", "new Gemma"))}, refs={"main": FIRST}
        ),
    }
    single = repositories["some/single"].commits[FIRST]
    older = write_folder(tmp_path / "older", tensors=random_tensors("new Gemma", seed=1), shard_of=three_shards)
    repositories["some/both"] = Repository(commits={FIRST: files_of(older) | single}, refs={"main": FIRST})
    adapted = single | {"adapter_config.json": b"{}"}
    repositories["some/adapter"] = Repository(commits={FIRST: adapted}, refs={"main": FIRST})
    with serve(StandInHub(repositories)) as running:
        yield running


def python(code: str, tmp_path: Path, url: str, **variables: str) -> Any:
    """Run code in a process of its own, since huggingface_hub reads its settings when it is imported."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "SAFEVLM_"))}
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    prelude = (
        "import json, sys\n"
        "from safevlm.checkpoint.checkpoint import open_checkpoint\n"
        "from safevlm.errors import InputError\n"
        "def refusal(*args, **kwargs):\n"
        "    try:\n"
        "        open_checkpoint(*args, **kwargs)\n"
        "    except InputError as error:\n"
        "        return [type(error).__name__, str(error)]\n"
        "    return ['nothing', 'was refused']\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", prelude + code],
        env={**inherited, "PYTHONPATH": str(Path.cwd()), **settings, **variables},
        capture_output=True,
        check=False,
        text=True,
        timeout=600,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


OPEN_AND_READ = """
c = open_checkpoint('SafeLLaVA-7B')
c.tensors.sha256(c.vision_names() + c.head_names())  # reads as `read` does, and needs no torch
print(json.dumps({
    'name': c.name, 'family': c.family.key, 'revision': c.revision, 'learned': c.tap.learned,
    'tap': c.tap.source, 'hash': c.tensors.sha256(c.head_names()), 'folder': str(c.folder),
    'language': len(c.language_names()), 'read': sorted(c.tensors.read_names),
}))
"""


def test_a_guard_is_read_without_fetching_the_language_model_and_again_offline(hub: StandInHub, tmp_path: Path) -> None:
    seen = python(OPEN_AND_READ, tmp_path, hub.url)
    assert (seen["name"], seen["family"], seen["revision"]) == ("SafeLLaVA-7B", "llava", SECOND)
    assert (seen["tap"], seen["learned"]) == ("projector", "detected")
    assert seen["language"] == 5
    assert not [name for name in seen["read"] if "language_model" in name]
    assert hub.fetched() == LIGHT | {"modeling_safe.py", HEAD_SHARD, VISION_SHARD}
    asked = {path.split("/resolve/")[1].split("/", 1)[1] for _, path in hub.log if "/resolve/" in path}
    assert asked == hub.fetched(), "not even the headers of other files are asked for"

    # Offline from the cache: the same, and the server hears nothing.
    hub.log.clear()
    assert python(OPEN_AND_READ, tmp_path, hub.url, HF_HUB_OFFLINE="1") == seen
    assert hub.log == []

    # Offline, a shard that was never needed is missing, and the message says so.
    code = """
c = open_checkpoint('SafeLLaVA-7B')
try:
    c.tensors.sha256(['lm_head.weight'])
except InputError as error:
    print(json.dumps({'error': [type(error).__name__, str(error)]}))
"""
    kind, text = python(code, tmp_path, hub.url, HF_HUB_OFFLINE="1")["error"]
    assert kind == "HubError"
    assert LANGUAGE_SHARD in text
    assert "Unset HF_HUB_OFFLINE" in text

    # Online again only the one shard is fetched.
    code = """
c = open_checkpoint('SafeLLaVA-7B')
print(json.dumps({'shape': list(c.tensors.shape('lm_head.weight'))}))
"""
    assert python(code, tmp_path, hub.url)["shape"] == [11, 8]
    assert hub.fetched() == {LANGUAGE_SHARD}


def test_opening_fetches_the_heads_shard_alone_and_a_revision_pins_every_file(hub: StandInHub, tmp_path: Path) -> None:
    code = f"""
found = {{}}
for key, model, revision in (
    ('tag', '{SAFELLAVA}@v1', None), ('argument', '{SAFELLAVA}', 'v1'), ('commit', 'SafeLLaVA-7B@{FIRST}', None),
):
    c = open_checkpoint(model, revision=revision)
    found[key] = [c.revision, c.tap.learned, c.tensors.sha256(c.head_names())]
print(json.dumps(found))
"""
    found = python(code, tmp_path, hub.url)
    assert found["tag"] == found["argument"] == found["commit"]
    assert found["tag"][:2] == [FIRST, "default"]
    assert hub.fetched() == LIGHT | {HEAD_SHARD}
    assert {path.split("/resolve/")[1].split("/")[0] for _, path in hub.log if "/resolve/" in path} == {FIRST}
    assert python(OPEN_AND_READ, tmp_path, hub.url)["hash"] != found["tag"][2]


def test_one_file_without_index_and_the_users_token(hub: StandInHub, tmp_path: Path) -> None:
    code = """
found = {}
for model in ('some/single', 'some/gated', 'some/private'):
    found[model] = open_checkpoint(model).family.key
print(json.dumps(found))
"""
    found = python(code, tmp_path, hub.url, HF_TOKEN="hf_right")
    assert found == {"some/single": "gemma3", "some/gated": "llava", "some/private": "llava"}


def test_every_refusal_of_the_hub_has_its_message(hub: StandInHub, tmp_path: Path) -> None:
    code = """
print(json.dumps({m: refusal(m) for m in (
    'some/gated', 'some/private', 'some/missing', 'SafeLLaVA-7B@v9', 'SafeGem-12B', 'some/pickle', 'a--b/c',
)}))
"""
    found = python(code, tmp_path, hub.url)

    def check(model: str, kind: str, *pieces: str) -> None:
        got, text = found[model]
        assert got == kind, text
        for piece in pieces:
            assert piece in text

    check("some/gated", "HubError", "'some/gated' is gated", f"Accept its terms at {hub.url}/some/gated", "HF_TOKEN")
    check("some/private", "HubError", "shows no model 'some/private'", "HF_TOKEN")
    check("some/missing", "HubError", "shows no model 'some/missing'", "Check the spelling")
    check("SafeGem-12B", "HubError", "shows no model 'etri-vilab/SafeGem-12B'")
    check("SafeLLaVA-7B@v9", "HubError", "no such revision", "'v9'", "a full commit hash is allowed")
    check("some/pickle", "CheckpointError", "pickle only (pytorch_model.bin)", "can run any code")
    check("a--b/c", "HubError", "'a--b/c' is not a hub id", "Allowed are")
    assert not [name for name in hub.fetched() if not name.endswith((".json", ".jinja", ".model", ".py"))]


def test_offline_with_a_cold_cache_is_refused_without_a_request(hub: StandInHub, tmp_path: Path) -> None:
    code = f"print(json.dumps({{m: refusal(m) for m in ('SafeGem-12B', 'SafeGem-12B@{FIRST}')}}))"
    found = python(code, tmp_path, hub.url, HF_HUB_OFFLINE="1")
    for kind, text in found.values():
        assert kind == "HubError"
        assert "'etri-vilab/SafeGem-12B'" in text
        assert "HF_HUB_OFFLINE forbids downloading it. Unset HF_HUB_OFFLINE" in text
    assert hub.log == []


def test_a_hub_that_cannot_be_reached_or_fails_is_refused(hub: StandInHub, tmp_path: Path) -> None:
    code = f"print(json.dumps({{m: refusal(m) for m in ('some/model', 'some/model@{FIRST}')}}))"
    for kind, text in python(code, tmp_path, "http://127.0.0.1:9").values():
        assert kind == "HubError"
        assert "the hub http://127.0.0.1:9 cannot be reached for 'some/model'" in text
        assert "Set HTTPS_PROXY or HF_ENDPOINT" in text and "--model FOLDER" in text
    hub.broken = 403
    ((kind, text),) = python("print(json.dumps([refusal('some/model')]))", tmp_path, hub.url)
    assert kind == "HubError"
    assert "answered 403 for 'some/model'. Check that HF_TOKEN is valid" in text


OUT_OF_REACH = """
import http.server, socket, ssl, threading
import safevlm.checkpoint.hub_failures
from safevlm.checkpoint.hub import fetch_checkpoint

class Says(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_GET(self):
        page = b'<html>Please log in</html>'
        self.send_response(STATUS)
        self.send_header('Content-Length', str(len(page)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(page)
    do_HEAD = do_CONNECT = do_GET

server = http.server.ThreadingHTTPServer(('127.0.0.1', PORT), Says)
threading.Thread(target=server.serve_forever, daemon=True).start()
safevlm.checkpoint.hub_failures.SECONDS = 0.3 if SILENT else 600
found = {}
try:
    fetch_checkpoint('owner/name')
except InputError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.parametrize(
    ("status", "variables", "reason"),
    [
        (
            200,
            {"HF_ENDPOINT": "http://me:secret@127.0.0.1:9"},
            r"the hub http://127\.0\.0\.1:9 .*\(Connection refused\)",
        ),
        (200, {"HF_ENDPOINT": "https://nowhere.invalid"}, r"its name cannot be resolved \(DNS\)"),
        (200, {"HF_ENDPOINT": "hub.example"}, "it should look like https://huggingface.co"),
        (200, {"HF_ENDPOINT": "http://127.0.0.1:{port}"}, "login page of a network"),
        (511, {"HF_ENDPOINT": "http://127.0.0.1:{port}"}, "login page of a network"),
        (404, {"HF_ENDPOINT": "http://127.0.0.1:{port}"}, "answered 404 .*Check that HF_ENDPOINT"),
        (429, {"HF_ENDPOINT": "http://127.0.0.1:{port}"}, "answered 429 .*too many requests"),
        (503, {"HF_ENDPOINT": "http://127.0.0.1:{port}"}, "answered 503 .*Try again later"),
        (200, {"HF_ENDPOINT": "https://127.0.0.1:{port}"}, "TLS fails, wrong version number"),
        (
            407,
            {"HTTPS_PROXY": "http://me:secret@127.0.0.1:{port}"},
            "the proxy http://127.* a name and password",
        ),
        (403, {"HTTPS_PROXY": "http://me:secret@127.0.0.1:{port}"}, "the proxy refuses: 403"),
        (407, {"HF_ENDPOINT": "http://hub.example", "HTTP_PROXY": "me:secret@127.0.0.1:{port}"}, "a name and password"),
        (200, {"HTTPS_PROXY": "http://me:secret@127.0.0.1:9"}, r"through the proxy http://127.*\(Connection refused\)"),
        (200, {"HTTPS_PROXY": "ftp://me:secret@127.0.0.1:9"}, "begins with neither http"),
        (200, {"HTTPS_PROXY": "socks5://me:secret@127.0.0.1:9"}, r"pip install 'httpx\[socks\]'"),
        (200, {"HTTPS_PROXY": "http://me:secret@[::bad"}, "the proxy's address is malformed"),
        (200, {"SSL_CERT_FILE": __file__}, "which holds no certificate"),
        (200, {"SSL_CERT_FILE": "/nowhere/ca.pem"}, "SSL_CERT_FILE names /nowhere/ca.pem, which does not exist"),
        (200, {"HF_TOKEN": "hf_secretü"}, "HF_TOKEN contains characters"),
    ],
)
def test_a_hub_out_of_reach_is_told_with_the_ways_out(
    status: int, variables: dict[str, str], reason: str, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {key: value.format(port=port) for key, value in variables.items()}
    endpoint = settings.pop("HF_ENDPOINT", "https://huggingface.co")
    settings = {"NO_PROXY": "", "no_proxy": "", "HTTPS_PROXY": "", "HTTP_PROXY": "", "HF_TOKEN": "hf_secret"} | settings
    told = python(f"STATUS, PORT, SILENT = {status}, {port}, False\n{OUT_OF_REACH}", tmp_path, endpoint, **settings)
    assert re.search(reason, told), told
    assert "secret" not in told and "https_proxy" not in told
    for way in ("HTTPS_PROXY or HF_ENDPOINT", "hf download owner/name --local-dir name", "--model FOLDER"):
        assert way in told


def test_a_hub_that_never_answers_is_given_up(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        told = python(f"STATUS, PORT, SILENT = 200, 0, True\n{OUT_OF_REACH}", tmp_path, endpoint)
    assert "no answer in time; a firewall may drop the packets" in told and "--model FOLDER" in told


def test_a_cache_that_cannot_be_written_is_a_matter_of_the_place(hub: StandInHub, tmp_path: Path) -> None:
    code = f"print(json.dumps(refusal('{SAFELLAVA}')))"
    kind, told = python(code, tmp_path, hub.url, HF_HUB_CACHE="/dev/null/hub")
    assert kind == "StorageError" and "/dev/null" in told and "HF_HOME" in told


def test_the_six_names_are_what_the_hub_calls_them() -> None:
    assert len(KNOWN_CHECKPOINTS) == 6
    for name, repo_id in KNOWN_CHECKPOINTS.items():
        assert repo_id == f"etri-vilab/{name}"
        reference = find_model(name)
        assert (reference.name, reference.repo_id, reference.folder, reference.revision) == (name, repo_id, None, None)


def test_a_known_name_is_looked_up_on_this_machine_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored, here = tmp_path / "stored" / "SafeGem-12B", tmp_path / "here"
    stored.mkdir(parents=True)
    here.mkdir()
    monkeypatch.chdir(here)
    assert find_model("SafeGem-12B").repo_id == "etri-vilab/SafeGem-12B"
    monkeypatch.setenv(MODELS_VARIABLE, str(stored.parent))
    assert find_model("SafeGem-12B").folder == stored
    assert find_model("SafeGem-12B@main").repo_id == "etri-vilab/SafeGem-12B"
    assert find_model("SafeGem-27B").folder is None
    (here / "SafeGem-12B").mkdir()
    folder = find_model("SafeGem-12B").folder
    assert folder is not None
    assert folder.resolve() == here / "SafeGem-12B"


def test_a_hub_id_may_carry_its_revision() -> None:
    reference = find_model("owner/name.v2@refs/pr/1")
    assert (reference.repo_id, reference.revision) == ("owner/name.v2", "refs/pr/1")
    assert find_model("owner/name", "v1").revision == "v1"
    assert find_model("owner/name@v1", "v1").revision == "v1"
    with pytest.raises(InputError, match="'owner/name@v1' and revision 'v2' contradict"):
        find_model("owner/name@v1", "v2")
    with pytest.raises(InputError, match="a revision must follow the '@', such as 'owner/name@main'"):
        find_model("owner/name@")


@pytest.mark.parametrize(
    ("text", "near"),
    [("SafeLLava-7b", "SafeLLaVA-7B"), ("safegem-12B@main", "SafeGem-12B"), ("tiny-safegemm", "tiny-safegem")],
)
def test_an_unknown_name_lists_what_is_allowed_and_the_nearest(text: str, near: str) -> None:
    with pytest.raises(InputError) as caught:
        find_model(text)
    message = str(caught.value)
    assert f"'{text}' is neither a folder nor a known checkpoint. Did you mean '{near}'?" in message
    for name in (*KNOWN_CHECKPOINTS, *TINY_CHECKPOINTS, "owner/name@revision"):
        assert name in message


NONSENSE = [
    "",
    "zzz",
    "./missing",
    "../x/y",
    "/no/such/folder",
    "a/b/c",
    "owner/",
    "/name",
    "~/x",
    "~nobody-here/x",
    "x" * 5000,
    "a\0b",
]


@pytest.mark.parametrize("text", NONSENSE)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"neither a folder nor a known checkpoint\. Allowed are: a folder"):
        find_model(text)


def test_a_path_is_never_taken_for_a_hub_id(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such folder"):
        find_model(Path("owner/name"))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(InputError, match="is a file; a checkpoint is a folder"):
        find_model(str(tmp_path / "model.safetensors"))


def test_a_tiny_name_is_what_ships_with_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safevlm.checkpoint.hub.TINY_FOLDER", tmp_path)
    with pytest.raises(InputError, match="'tiny-safegem' is a checkpoint that ships with this project, but"):
        find_model("tiny-safegem")
    (tmp_path / "tiny-safegem").mkdir()
    assert find_model("tiny-safegem").folder == tmp_path / "tiny-safegem"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "config.json", "other.safetensors"])
def test_only_listed_safetensors_are_shards(name: str, tmp_path: Path) -> None:
    commit = HubCheckpoint(repo_id="a/b", folder=tmp_path, commit=FIRST, files=frozenset({"pytorch_model.bin"}))
    with pytest.raises(CheckpointError, match=f"'{name}' is not one of the .safetensors files"):
        commit.shard(name)


def test_the_stand_in_tensors_differ_between_commits() -> None:
    first, second = random_tensors("original LLaVA"), random_tensors("original LLaVA", seed=1)
    assert not torch.equal(first["img_safety_head.mlp.0.weight"], second["img_safety_head.mlp.0.weight"])


def test_a_single_file_goes_before_an_index_and_an_adapter_is_refused(hub: StandInHub, tmp_path: Path) -> None:
    code = """
both, single = open_checkpoint('some/both'), open_checkpoint('some/single')
print(json.dumps({
    'same': both.tensors.sha256(both.head_names()) == single.tensors.sha256(single.head_names()),
    'ignored': both.ignored.files, 'adapter': refusal('some/adapter'),
}))
"""
    seen = python(code, tmp_path, hub.url)
    assert seen["same"]
    assert seen["ignored"] == sorted([HEAD_SHARD, VISION_SHARD, LANGUAGE_SHARD, "model.safetensors.index.json"])
    assert (
        seen["adapter"][0] == "CheckpointError" and "'adapter_config.json' belongs to an adapter" in seen["adapter"][1]
    )
    assert not {HEAD_SHARD, VISION_SHARD, LANGUAGE_SHARD} & hub.fetched()
