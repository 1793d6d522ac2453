"""The doctor: it says what is there and what is missing for what, and breaks on nothing that is broken."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import Marker

from safevlm.installed.libraries import CORE, EXTRAS, clashes, library
from safevlm.installed.machine_parts import find_gpus, find_places
from tests.test_imports import HEAVY

ROOT = Path(__file__).parents[2]


def doctor(*arguments: str, first: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, filter(None, (first, ROOT))))
    variables = {**os.environ, "PYTHONPATH": path, "COLUMNS": "120", **environment}
    command = [sys.executable, "-m", "safevlm", "doctor", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=600)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def told(done: subprocess.CompletedProcess[str]) -> Any:
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is of Python 3.11")
def test_the_libraries_are_those_of_the_package() -> None:
    project = import_module("tomllib").loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def stated(requirements: list[str]) -> dict[str, str]:
        found = [each.partition(" ; ") for each in requirements]
        here = [each for each, _, marker in found if not marker or Marker(marker).evaluate()]
        return dict(re.fullmatch(r"([\w-]+)(?:\[[\w,]+\])?(.*)", each).groups() for each in here)  # type: ignore[union-attr]

    assert stated(project["dependencies"]) == CORE
    extras = project["optional-dependencies"]
    assert {name: stated(extras[name]) for name in EXTRAS} == {name: extra.needs for name, extra in EXTRAS.items()}
    assert set(extras) - set(EXTRAS) <= {"dev", "docs"}, "an extra that the doctor does not know"


def test_a_machine_that_works_is_0_and_json_and_text_agree() -> None:
    found, text = told(doctor("--json")), doctor()
    assert text.returncode == 0 and found["works"] is True and found["folder"] == str(ROOT)
    assert found["packages"] == ["runtimes", "calibration", "quantize", "export", "benchmarks"]
    lines = text.stdout.splitlines()
    for name, libraries in found["extras"].items():
        line = next(each for each in lines if EXTRAS[name].purpose in each)
        missing = [each["name"] for each in libraries if each["state"] != "ok"]
        assert line.startswith("no " if missing else "ok "), line
        assert (f"pip install 'safevlm-edge[{name}]'" in line) == bool(missing)
        assert EXTRAS[name].hint in line or not missing
        assert all(f"{each} " in line for each in missing)
    assert all(each["path"] in text.stdout for each in found["places"])


def test_nothing_heavy_is_imported() -> None:
    code = "import sys; from safevlm.doctor import find; find(); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=600
    )
    heavy = HEAVY | {"tensorrt", "onnxruntime", "openvino", "llama_cpp", "fastapi", "matplotlib", "sklearn", "datasets"}
    assert not set(done.stdout.split()) & heavy


def distribution(folder: Path, name: str, metadata: bytes | None) -> None:
    (folder / f"{name}-1.0.dist-info").mkdir(parents=True)
    if metadata is not None:
        (folder / f"{name}-1.0.dist-info" / "METADATA").write_bytes(metadata)


METADATA = {
    "of an old version": (b"Name: torch\nVersion: 1.0\n", "unfit"),
    "of a version that is none": (b"Name: torch\nVersion: new\n", "unfit"),
    "without a version": (b"Name: torch\n", "broken"),
    "empty": (b"", "broken"),
    "not there": (None, "broken"),
    "no text": (b"Name: torch\nVersion: \xff\xfe\n", "broken"),
}


@pytest.mark.parametrize(("metadata", "state"), METADATA.values(), ids=METADATA)
def test_metadata_that_is_wrong_is_reported(
    metadata: bytes | None, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution(tmp_path, "torch", metadata)
    monkeypatch.syspath_prepend(tmp_path)
    found = library("torch", ">=2.8")
    assert (found.name, found.needs, found.state) == ("torch", ">=2.8", state), found
    assert found.problem or found.version


def test_a_library_is_as_it_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution(tmp_path, "gone", b"Name: gone\nVersion: 3.1.post2\n")
    (tmp_path / "bare.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path)
    assert library("gone", ">=1").state == "broken", "its code is not there"
    assert library("bare", ">=1").state == "ok", "built from source, without metadata"
    assert library("nowhere", ">=1").state == "missing"
    (tmp_path / "gone.py").touch()
    for needs, state in (
        (">=3.1", "ok"),
        (">=3.2", "unfit"),
        (">=3,<3.1", "unfit"),
        (">=3,<4", "ok"),
        (">=3.1.0", "ok"),
    ):
        assert library("gone", needs).state == state, needs
    distribution(tmp_path, "onnxruntime", b"Name: onnxruntime\nVersion: 1.30\n")
    assert library("onnxruntime-gpu", ">=1.22").state == "missing" and not clashes()
    distribution(tmp_path, "onnxruntime_gpu", b"Name: onnxruntime-gpu\nVersion: 1.30\n")
    assert library("onnxruntime-gpu", ">=1.22").state == "ok"
    assert [each.split(" overwrite")[0] for each in clashes()] == ["onnxruntime and onnxruntime-gpu"]


@pytest.mark.parametrize("content", ["raise RuntimeError('built for another numpy')", "raise SystemError", "("])
@pytest.mark.parametrize("name", ["numpy", "pydantic", "PIL"])
def test_a_core_that_cannot_be_imported_is_1_and_named(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.py").write_text(content)
    done = doctor(first=tmp_path)
    assert done.returncode == 1, done.stdout
    line = next(each for each in done.stdout.splitlines() if each.startswith("no  core"))
    assert "is broken (importing it fails: " in line and "pip install --force-reinstall click numpy" in line
    found = told(doctor("--json", first=tmp_path))
    assert found["works"] is False
    assert [each["name"] for each in found["core"] if each["state"] != "ok"] == [name.replace("PIL", "pillow")]


def test_without_click_one_line_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['click'] = None\n")
    done = doctor(first=tmp_path)
    assert done.stderr == "error: the package 'click' is not installed: pip install safevlm-edge\n"
    assert done.returncode == 2


SMI = {
    "one GPU": ("echo 'NVIDIA H100 80GB HBM3, 550.54, 81559'", 1, None),
    "two GPUs": ("echo 'A, 1, 2'; echo 'B, 1, [N/A]'", 2, None),
    "no driver": ("echo 'NVIDIA-SMI has failed because it could not reach the driver.'; exit 9", 0, "reach the driver"),
    "silent": ("exit 3", 0, "exit code 3"),
    "nothing": ("true", 0, "lists no GPU"),
    "other words": ("echo hello", 0, "lists no GPU"),
    "no text": (r"printf '\377\376,\n'", 0, "lists no GPU"),
}


@pytest.mark.parametrize(("script", "count", "note"), SMI.values(), ids=SMI)
def test_gpus_are_what_nvidia_smi_says(
    script: str, count: int, note: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    gpus = find_gpus()
    assert len(gpus.found) == count
    assert (note is None and gpus.note is None) or (note is not None and note in (gpus.note or ""))


def test_an_nvidia_smi_that_hangs_or_is_no_program_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("safevlm.installed.machine_parts.SECONDS", 0.1)
    for content in ("#!/bin/sh\nexec sleep 600\n", "#!/nowhere/sh\n"):
        program.write_text(content)
        program.chmod(0o755)
        assert (find_gpus().note or "").startswith("nvidia-smi failed: ")


def test_places_that_cannot_be_used_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "/proc/none")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "later"))
    monkeypatch.setenv("SAFEVLM_MODELS", "n" * 5000)
    hub, models, timings, *_ = find_places()
    assert hub.path == "/proc/none/hub" and hub.problem is not None
    assert models.problem is not None and models.free_bytes is None
    assert timings.path == str(tmp_path / "later" / "safevlm-edge") and timings.problem is None
    assert timings.free_bytes is not None and timings.free_bytes > 0


def test_a_folder_that_is_gone_and_no_home_break_nothing(tmp_path: Path) -> None:
    gone = 'mkdir gone; cd gone; rmdir ../gone; "$0" -m safevlm doctor --json'
    variables = {name: value for name, value in os.environ.items() if name != "HOME"} | {"PYTHONPATH": str(ROOT)}
    command = ["sh", "-c", gone, sys.executable]
    done = subprocess.run(
        command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert next(each for each in told(done)["places"] if each["purpose"] == "the current folder")["problem"]
