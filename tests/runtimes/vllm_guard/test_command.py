"""``python -m runtimes.vllm``: what it starts, and what it refuses before anything is started."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runtimes.vllm import server_flags
from runtimes.vllm_guard import versions
from safevlm.errors import InputError
from tests.quantize.streamed.test_consumers import ROOT

FOUND = {"vllm": "0.32.0", "head": "ab" * 32, "classes": ["safe", "hate"], "layers": 3}


def flags(*given: str, **more: Any) -> list[str]:
    return server_flags(Path("model"), Path("/dev/shm/x"), FOUND, given, **more)


def value(given: list[str], flag: str) -> Any:
    return json.loads(given[given.index(flag) + 1])


def test_the_flags_connect_the_guard_and_keep_the_callers_own() -> None:
    found = flags("--port", "9000", "--tensor-parallel-size=2")
    assert found[-3:] == ["--port", "9000", "--tensor-parallel-size=2"]
    assert found[found.index("--block-size") + 1] == "32"
    speculative = value(found, "--speculative-config")
    assert speculative["draft_model_config"]["hf_config"]["eagle_aux_hidden_state_layer_ids"] == [3]
    extra = value(found, "--kv-transfer-config")["kv_connector_extra_config"]
    assert extra == {"shared_storage_path": "/dev/shm/x", "head_sha256": "ab" * 32, "classes": ["safe", "hate"]}
    untested = value(flags(allow_untested=True), "--kv-transfer-config")
    assert untested["kv_connector_extra_config"]["allow_untested_vllm"] is True


def test_a_block_size_of_the_caller_stays() -> None:
    assert flags("--block-size", "64").count("--block-size") == 1 and "32" not in flags("--block-size=64")


@pytest.mark.parametrize("flag", ["--kv-transfer-config", "--kv_transfer_config", "--speculative-config={}", "-sc"])
def test_flags_that_would_take_the_guard_out_are_refused(flag: str) -> None:
    with pytest.raises(InputError, match="Leave it out"):
        flags(flag)


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("0.9.2", "too old"),
        ("0.31.4", "too old"),
        ("0.33.0", "not tested"),
        ("1.0.0rc1", "not tested"),
        ("", "not tested"),
    ],
)
def test_versions_of_vllm_that_were_not_tested_are_refused(version: str, said: str) -> None:
    assert said in str(versions.version_problem(version))


def test_the_tested_series_is_taken() -> None:
    assert all(versions.version_problem(each) is None for each in ("0.32", "0.32.0", "0.32.1+cpu", "0.32.0rc2"))
    assert versions.version_problem("0.320.0") is not None


def interpreter(folder: Path, said: dict[str, Any] | str, code: int = 0) -> Path:
    """Write a stand-in for vLLM's interpreter: it says ``said`` of a model, and shows what it is started with."""
    path = folder / "python"
    text = said if isinstance(said, str) else json.dumps(said)
    path.write_text(
        f"#!{sys.executable}\n"
        "import json, os, sys\n"
        "if 'runtimes.vllm_guard' in sys.argv:\n"
        f"    print({text!r})\n"
        "else:\n"
        "    storage = json.loads(sys.argv[sys.argv.index('--kv-transfer-config') + 1])\n"
        "    storage = storage['kv_connector_extra_config']['shared_storage_path']\n"
        "    packages = os.environ['PYTHONPATH'].split(os.pathsep)[0]\n"
        "    print(json.dumps({'arguments': sys.argv[1:], 'storage': storage, 'mode': os.stat(storage).st_mode,\n"
        "                      'packages': sorted(os.listdir(packages))}))\n"
        f"    sys.exit({code})\n"
    )
    path.chmod(0o755)
    return path


def started(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runtimes.vllm", "--model", "model", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "/x"})


def test_the_server_gets_a_private_folder_that_goes_with_it_and_its_exit_code_is_ours(tmp_path: Path) -> None:
    done = started("--python", str(interpreter(tmp_path, FOUND, 7)), "--port", "9000")
    assert done.returncode == 7, done.stderr
    said = json.loads(done.stdout)
    assert said["arguments"][:2] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert said["arguments"][-2:] == ["--port", "9000"]
    assert said["packages"] == ["runtimes", "safevlm"], "nothing else of ours is found there"
    assert stat.S_IMODE(said["mode"]) == 0o700 and not Path(said["storage"]).exists()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"error": "vLLM 0.9 is too old. Install vLLM 0.32."}, "vLLM 0.9 is too old"),
        ("no JSON", "cannot read the model"),
        ("", "cannot read the model"),
    ],
)
def test_what_cannot_be_served_is_said_before_the_start(tmp_path: Path, answer: Any, said: str) -> None:
    done = started("--python", str(interpreter(tmp_path, answer)))
    assert done.returncode == 2 and said in done.stderr and done.stdout == ""


def test_an_interpreter_that_is_not_there_and_a_storage_that_cannot_be_written(tmp_path: Path) -> None:
    missing = started("--python", str(tmp_path / "nothing"))
    assert missing.returncode == 2 and "cannot be run" in missing.stderr
    (tmp_path / "file").write_text("")
    storage = started("--python", str(interpreter(tmp_path, FOUND)), "--storage", str(tmp_path / "file"))
    assert storage.returncode == 2 and "cannot hold verdicts" in storage.stderr


def test_without_vllm_it_says_where_to_install_it() -> None:
    command = [sys.executable, "-m", "runtimes.vllm_guard", "model"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "vLLM is not installed" in json.loads(done.stdout)["error"]
