"""The installed package inside a project that has packages named as ours are, and on a device with a part of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.runtimes.bundles import GREEN, RED, picture, write_bundle

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("safevlm", "runtimes", "calibration", "quantize", "export", "benchmarks")
OWN = ("models", "benchmarks", "tests", "utils", "export", "calibration")


@dataclass(frozen=True)
class Project:
    """A folder with packages of its own, and where ours are installed."""

    folder: Path
    installed: Path

    def python(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run Python in the folder, without an editable installation that this environment may have (-S)."""
        libraries = [each for each in sys.path if each and Path(each).resolve() != ROOT]
        path = os.pathsep.join(map(str, [self.folder, self.installed, *libraries]))
        environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "120", **variables}
        command = [sys.executable, "-S", *arguments]
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False, timeout=600
        )
        assert "Traceback" not in done.stderr or "-c" in arguments, done.stderr
        return done

    def safevlm(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command as the shell finds it."""
        return self.python(str(self.installed / "bin" / "safevlm"), *arguments)


def write_project(folder: Path, installed: Path, packages: Sequence[str] = OWN) -> Project:
    for name in packages:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("OWN = True\n")
    write_bundle(folder / "bundle")
    picture(folder / "red.png", RED)
    picture(folder / "green.png", GREEN)
    return Project(folder, installed)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from the sources alone, as a build folder may hold older ones, and install it into a folder."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, timeout=600)
    return target


@pytest.fixture(scope="module")
def project(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    return write_project(tmp_path_factory.mktemp("project"), installed)


def test_the_wheel_holds_our_packages_whole_and_nothing_else(installed: Path) -> None:
    top = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert top == {*PACKAGES, "bin"}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".md":
                assert (installed / path.relative_to(ROOT)).is_file(), f"{path} is not in the wheel"


LIBRARY = """
import sys
import benchmarks, calibration, export, models, tests, utils
from safevlm import Guard, Manifest
assert all(each.OWN for each in (benchmarks, calibration, export, models, tests, utils))
with Guard.open("bundle") as guard:
    print(*(judgement.verdict for judgement in guard.judge(["red.png", "green.png"])))
print(sys.modules["runtimes"].__file__)
assert "torch" not in sys.modules
"""


def test_the_library_works_beside_packages_of_the_same_names(project: Project) -> None:
    (project.folder / "script.py").write_text(LIBRARY)
    done = project.python("script.py")
    assert done.stdout.splitlines() == ["block allow", str(project.installed / "runtimes" / "__init__.py")], done.stderr


@pytest.mark.parametrize("module", [False, True])
def test_the_command_works_beside_packages_of_the_same_names(project: Project, module: bool) -> None:
    def safevlm(*arguments: str) -> subprocess.CompletedProcess[str]:
        return project.python("-m", "safevlm", *arguments) if module else project.safevlm(*arguments)

    assert safevlm("check", "bundle", "red.png").returncode == 10
    assert safevlm("check", "bundle", "green.png").returncode == 0
    helped = safevlm("export", "trt", "--help")
    program = "python -m safevlm" if module else "safevlm"
    assert helped.returncode == 0 and f"Usage: {program} export trt [OPTIONS]" in helped.stdout, helped.stderr
    refused = safevlm("export", "trt")
    assert refused.returncode == 2 and refused.stderr.startswith("error: --model or --bundle is missing"), (
        refused.stderr
    )


def test_a_shell_that_asks_is_told_how_to_complete(project: Project) -> None:
    program = str(project.installed / "bin" / "safevlm")
    source = project.python(program, _SAFEVLM_COMPLETE="bash_source")
    assert source.returncode == 0 and "complete -o nosort -F _safevlm_completion safevlm" in source.stdout
    typed = {"COMP_WORDS": "safevlm export t", "COMP_CWORD": "2"}
    assert project.python(program, _SAFEVLM_COMPLETE="bash_complete", **typed).stdout == "plain,trt\n"


def test_a_command_that_needs_all_of_ours_runs_there_and_its_children_do(project: Project) -> None:
    out = project.folder / "suite"
    done = project.safevlm("benchmarks", "holisafe-mini", "--pairs", "100", "--questions", "0", "--out", str(out))
    assert done.returncode == 0 and (out / "holisafe_bench.json").is_file(), done.stderr
    child = project.python("-m", "safevlm.terminal.child", "benchmarks.holisafe_mini", "--help")
    assert child.stdout.startswith("Usage: python -m benchmarks.holisafe_mini [OPTIONS]"), child.stderr


def test_a_module_of_a_package_that_is_hidden_is_not_found(project: Project) -> None:
    done = project.python("-m", "export.trt")
    assert done.returncode == 1 and "No module named export.trt" in done.stderr


def test_what_hides_a_sibling_is_named_with_the_command_to_run(project: Project) -> None:
    done = project.python("-m", "quantize.gptq", "--model", "a model")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: {project.folder / 'calibration'} hides the package 'calibration' of Safe-VLM Edge, which 'quantize' "
        "needs. Run instead: safevlm quantize gptq --model 'a model'\n"
    )
    code = """
from safevlm.errors import HiddenPackageError, InputError
for before in ("sys", "calibration"):  # not yet imported, and imported by the project itself
    __import__(before)
    try:
        import quantize.streamed.compress
    except ImportError as error:
        assert isinstance(error, HiddenPackageError) and isinstance(error, InputError)
        print(error)
"""
    told = project.python("-c", code)
    assert told.stdout.count("hides the package 'calibration'") == 2, told.stderr
    assert "safevlm quantize" in told.stdout


@pytest.mark.parametrize("hiding", ["calibration.py", "calibration/__init__.py"])
@pytest.mark.parametrize("package", ["quantize", "export", "benchmarks"])
def test_a_file_hides_as_a_folder_does_and_a_folder_without_code_does_not(
    installed: Path, tmp_path: Path, package: str, hiding: str
) -> None:
    project = write_project(tmp_path / "project", installed, [])
    (project.folder / "calibration").mkdir()
    assert project.python("-c", f"import {package}").returncode == 0
    (project.folder / hiding).write_text("")
    told = project.python("-c", f"import {package}").stderr
    place = project.folder / hiding.removesuffix("/__init__.py")
    assert f"{place} hides the package 'calibration'" in told


DECODING = """
from safevlm.imports.siblings import put_ours_first
put_ours_first()
import asyncio
from pathlib import Path
from runtimes.gateway.images.decoder import DecoderSettings
from runtimes.gateway.images.decoding import Decoders
from safevlm import open_bundle

async def decode():
    preprocessing = open_bundle("bundle").manifest.preprocessing
    settings = DecoderSettings(preprocessing=preprocessing, mode="whole", formats=("PNG",), max_pixels=10**6,
        seconds=60, memory=2**30, with_image=False)
    async with Decoders(settings, 1) as decoders:
        print((await decoders.decode(Path("red.png").read_bytes(), "red")).pixels.shape)

asyncio.run(decode())
"""


def test_runtimes_of_the_project_hides_ours_from_the_library_and_not_from_the_command(
    installed: Path, tmp_path: Path
) -> None:
    project = write_project(tmp_path / "project", installed, ["runtimes"])
    told = project.python("-c", "from safevlm import Guard").stderr
    assert f"{project.folder / 'runtimes'} hides the package 'runtimes' of Safe-VLM Edge" in told
    assert project.safevlm("check", "bundle", "red.png").returncode == 10
    decoded = project.python("-c", DECODING)
    assert decoded.stdout == "(1, 16, 16, 3)\n", decoded.stderr


def test_the_doctor_names_what_hides_ours_in_this_folder(project: Project) -> None:
    for done in (project.safevlm("doctor", "--json"), project.python("-m", "safevlm.doctor", "--json")):
        told = json.loads(done.stdout)
        assert done.returncode == 0 and told["folder"] == str(project.installed)
        assert told["hidden"] == {name: str(project.folder / name) for name in ("calibration", "export", "benchmarks")}
    assert "run safevlm export … instead" in project.safevlm("doctor").stdout


def test_on_a_device_with_safevlm_and_runtimes_alone_the_rest_is_named(installed: Path, tmp_path: Path) -> None:
    for name in ("safevlm", "runtimes", "bin"):
        shutil.copytree(installed / name, tmp_path / "device" / name)
    project = write_project(tmp_path / "project", tmp_path / "device", ["export"])
    assert project.safevlm("check", "bundle", "red.png").returncode == 10
    lists = project.safevlm("export", "--help")
    assert lists.returncode == 0 and lists.stdout.count("(not installed)") == 4
    refused = project.safevlm("export", "trt", "--model", "tiny-safegem")
    assert refused.returncode == 2 and refused.stderr.startswith("error: the package 'export' is not installed")
    told = project.safevlm("doctor", "--json")
    assert told.returncode == 0 and json.loads(told.stdout)["packages"] == ["runtimes"]
    assert json.loads(told.stdout)["hidden"] == {}
