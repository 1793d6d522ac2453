"""The program ``safevlm``: the same commands as ``python -m``, by the same words, with the same ends."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path

import click
import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner

from runtimes.check import main as check
from safevlm.errors import InputError
from safevlm.imports.siblings import PACKAGES
from safevlm.terminal.commandline import as_started, run
from safevlm.terminal.commands import COMMANDS, GROUPS, program
from tests.runtimes.bundles import GREEN, RED, picture, write_bundle

ROOT = Path(__file__).parents[3]


def ended(command: click.Command, *arguments: str) -> object:
    with pytest.raises(SystemExit) as caught:
        run(command, arguments)
    return caught.value.code


def test_what_python_m_runs_the_program_runs_by_the_same_words() -> None:
    modules = {
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__main__")
        for package in ("safevlm", *PACKAGES)
        for path in (ROOT / package).rglob("*.py")
        if "    run(main)" in path.read_text(encoding="utf-8")
    }
    typed = {module.removeprefix("safevlm.").replace(".", " ") for module in modules}
    assert typed == {each for each in COMMANDS if each == "doctor" or each.split()[0] in GROUPS}
    for typed, module in COMMANDS.items():
        words = typed.replace(" ", ".")
        if module == "benchmarks.runs.importing.command":  # `import` is no name that Python can import
            module = words
        assert module.removesuffix(".__main__") in (words, f"runtimes.{words}", f"safevlm.{words}")
    assert set(GROUPS) == set(PACKAGES)


@pytest.mark.parametrize("typed", COMMANDS)
def test_every_command_has_help_under_its_name(typed: str) -> None:
    done = CliRunner().invoke(program(), [*typed.split(), "--help"], prog_name="safevlm")
    assert done.exit_code == 0, done.output
    assert done.output.startswith(f"Usage: safevlm {typed} "), done.output


def test_lists_say_what_the_commands_say_and_import_none() -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom safevlm.terminal.commands import GROUPS, program\n"
        "for given in ([], ['--help'], *([group, '--help'] for group in GROUPS)):\n"
        "    print(CliRunner().invoke(program(), given, terminal_width=400).output)\n"
        "print('loaded', *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=600
    )
    lists, _, loaded = done.stdout.partition("\nloaded ")
    assert not set(loaded.split()) & {"torch", "transformers", "onnx", "numpy", "PIL", "pydantic", *PACKAGES}
    shown = " ".join(lists.split())
    for typed, module in COMMANDS.items():
        text = inspect.cleandoc(import_module(module).main.help).partition("\n\n")[0]
        assert f"{typed.removeprefix(typed.split()[0] + ' ')} {' '.join(text.split())}" in shown, typed


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [
        ("chekc", "check"),
        ("gatway --bundle x", "gateway"),
        ("docter", "doctor"),
        ("exprot trt --model x", "export trt"),
        ("export tr", "export trt"),
        ("export.trt --model x", "export trt"),
        ("export ONNX", "export onnx"),
        ("trt", "export trt"),
        ("regress", "benchmarks regress"),
        ("large-images", "benchmarks large_images"),
        ("benchmark run", "benchmarks run"),
        ("benchmarks check", "benchmarks"),
    ],
)
def test_a_typo_is_wrong_usage_and_the_nearest_command_is_named(
    typed: str, nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(program(), *typed.split()) == 2
    printed = capsys.readouterr()
    assert f"Did you mean 'safevlm {nearest}" in printed.err and printed.out == "", printed.err


@pytest.mark.parametrize("word", ["zzzz", "", "\x1b[31m", "ü" * 300])
def test_what_is_near_to_nothing_is_told_where_all_commands_are(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(program(), word) == 2
    said = capsys.readouterr().err
    assert "There is no command 'safevlm " in said and "'safevlm --help' lists all" in said and "\x1b" not in said


@pytest.mark.parametrize(
    "arguments", [["bundle", "red.png"], ["bundle", "green.png"], ["none", "red.png"], ["--nonsense"], [], ["--help"]]
)
def test_commands_end_as_they_do_by_themselves(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # as the script `safevlm` has it
    write_bundle(tmp_path / "bundle")
    picture(tmp_path / "red.png", RED)
    picture(tmp_path / "green.png", GREEN)
    ends = []
    for command, words in ((check, []), (program(), ["check"]), (program(), ["runtimes", "check"])):
        code = ended(command, *words, *arguments)
        said = capsys.readouterr()
        err = said.err.replace("safevlm export onnx", "python -m export.onnx")  # in what to do next
        ends.append((code, said.out.partition("\n")[2], err.partition("Error:")[2] or err))
    assert ends[0] == ends[1] == ends[2]
    assert ends[0][0] == {"red.png": 10, "green.png": 0, "--help": 0}.get(arguments[-1] if arguments else "", 2) or (
        arguments[:1] == ["none"]
    )


NEXT = "next: python -m runtimes.check x, python -m export.gguf. Not python -m pip install x"


@pytest.mark.parametrize(
    ("name", "start", "said"),
    [
        ("check", None, NEXT),
        ("safevlm", None, "next: safevlm check x, safevlm export gguf. Not python -m pip install x"),
        (
            "safevlm",
            ModuleSpec("safevlm.__main__", None),
            "next: python -m safevlm check x, python -m safevlm export gguf. Not python -m pip install x",
        ),
    ],
    ids=["a module", "the program", "the program as a module"],
)
def test_what_to_do_next_is_said_in_the_words_of_the_start(
    name: str, start: ModuleSpec | None, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", start)

    @click.group(name)
    def group() -> None:
        pass

    @group.command()
    @click.argument("failing", type=bool)
    def inner(*, failing: bool) -> None:
        if failing:
            raise InputError(NEXT)
        click.echo(as_started(NEXT))

    assert ended(group, "inner", "false") == 0 and ended(group, "inner", "true") == 2
    assert capsys.readouterr() == (f"{said}\n", f"error: {said}\n")


@pytest.mark.parametrize(
    ("before", "incomplete", "offered"),
    [
        ([], "ch", {"check", "chat"}),
        ([], "--v", {"--version"}),
        (["export"], "", {"onnx", "trt", "gguf", "hf"}),
        (["export", "trt"], "--hardware", {"--hardware-compatible"}),
        (["gateway", "keys"], "--he", {"--help"}),
        (["benchmarks", "speed"], "gu", {"guard"}),
        (["exprot"], "", set()),
    ],
)
def test_shells_complete_commands_and_options(before: list[str], incomplete: str, offered: set[str]) -> None:
    completions = BashComplete(program(), {}, "safevlm", "_SAFEVLM_COMPLETE").get_completions(before, incomplete)
    found = {each.value for each in completions}
    assert found == offered if offered else not found - set(COMMANDS) - set(GROUPS)


def test_the_version_is_printed() -> None:
    from safevlm import __version__

    assert CliRunner().invoke(program(), ["--version"]).output == f"safevlm {__version__}\n"


def test_children_of_ours_are_started_so_that_nothing_hides_them() -> None:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            started = re.search(r'"-m"(?!, "vllm\.)', text)  # vLLM's own server is not ours
            assert not ("sys.executable" in text and started), f"{path}: use safevlm.terminal.child"
