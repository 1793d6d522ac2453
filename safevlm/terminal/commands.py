"""The commands of ``safevlm``: ``safevlm export trt`` does what ``python -m export.trt`` does.

Nothing is imported before it is run or completed: what a list of commands says about each is read from its source.
"""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Iterator, Mapping
from importlib import import_module
from types import MappingProxyType

import click
from click.shell_completion import CompletionItem

from safevlm.errors import InputError
from safevlm.imports.siblings import PACKAGES, ROOT
from safevlm.terminal.printable import printable
from safevlm.version import VERSION

__all__ = ["COMMANDS", "GROUPS", "PROGRAM", "program"]

PROGRAM = "safevlm"
GROUPS: Mapping[str, str] = MappingProxyType(
    {
        "export": "Write guards and language models as ONNX, TensorRT, GGUF and transformers files.",
        "quantize": "Compress the language model of a checkpoint.",
        "calibration": "Fit guard heads and thresholds, and write answers to calibrate with.",
        "benchmarks": "Run suites, compare runs, measure speed.",
        "runtimes": "The commands check, gate, chat, vllm and gateway, by their package.",
    }
)
"""The groups, one for each of our packages, and what is in each."""
_GROUPED = {
    "export onnx": "export.onnx",
    "export trt": "export.trt",
    "export gguf": "export.gguf.__main__",
    "export hf": "export.hf",
    "quantize gptq": "quantize.gptq",
    "quantize int8": "quantize.int8",
    "calibration distill": "calibration.distill",
    "calibration thresholds": "calibration.thresholds",
    "calibration answers": "calibration.answers",
    "runtimes check": "runtimes.check",
    "runtimes gate": "runtimes.gate.__main__",
    "runtimes chat": "runtimes.chat",
    "runtimes vllm": "runtimes.vllm",
    "runtimes gateway": "runtimes.gateway.__main__",
    "runtimes gateway keys": "runtimes.gateway.keys",
    "benchmarks run": "benchmarks.run",
    "benchmarks judge": "benchmarks.judge",
    "benchmarks labels": "benchmarks.labels",
    "benchmarks regress": "benchmarks.regress",
    "benchmarks import": "benchmarks.runs.importing.command",
    "benchmarks robustness": "benchmarks.robustness",
    "benchmarks plan": "benchmarks.plan",
    "benchmarks export": "benchmarks.export",
    "benchmarks simulate": "benchmarks.simulate",
    "benchmarks speed": "benchmarks.speed.__main__",
    "benchmarks large_images": "benchmarks.large_images",
    "benchmarks holisafe_mini": "benchmarks.holisafe_mini",
    "benchmarks random_checkpoint": "benchmarks.random_checkpoint",
    "benchmarks real_checkpoint": "benchmarks.real_checkpoint",
    "benchmarks true_shapes": "benchmarks.true_shapes.__main__",
    "benchmarks gpu_proof": "benchmarks.gpu_proof.__main__",
    "benchmarks tiny": "benchmarks.tiny.__main__",
    "benchmarks tiny recipe": "benchmarks.tiny.recipe",
    "benchmarks demo": "benchmarks.demo",
}
_DAILY = {
    typed.removeprefix("runtimes "): module for typed, module in _GROUPED.items() if typed.startswith("runtimes ")
}
COMMANDS: Mapping[str, str] = MappingProxyType({**_DAILY, "doctor": "safevlm.doctor", **_GROUPED})
"""What is typed after ``safevlm``, and the module whose ``main`` it is. Those in daily use need no group."""


def program() -> click.Group:
    """Return the whole program."""
    group = _Group(
        "",
        name=PROGRAM,
        help="Compress Safe-VLMs, split off their guard, gate images with it, and prove that safety survived.",
        epilog="Each command can be run as a module, too: python -m export.trt is safevlm export trt.",
    )
    return click.version_option(VERSION, prog_name=PROGRAM, message="%(prog)s %(version)s")(group)


class _Group(click.Group):
    """Commands that are imported when they are run; ``prefix`` is what is typed before theirs, with a blank."""

    def __init__(self, prefix: str, *, name: str, help: str, epilog: str | None = None) -> None:  # noqa: A002
        super().__init__(name, help=help, epilog=epilog)
        self.prefix = prefix
        self.modules = {
            typed.removeprefix(prefix): module
            for typed, module in COMMANDS.items()
            if typed.startswith(prefix) and (prefix or typed.split()[0] not in GROUPS)
        }

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return [*self.modules, *([] if self.prefix else GROUPS)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if not self.prefix and cmd_name in GROUPS:
            return _Group(f"{cmd_name} ", name=cmd_name, help=GROUPS[cmd_name])
        return _load(self.modules[cmd_name]) if cmd_name in self.modules else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Take two words where the second names a command of the first, as in ``gateway keys``; - does for _, too."""
        words = 2 if _plain(args[:2]) in self.modules else 1
        command = self.get_command(ctx, _plain(args[:words]))
        if command is not None:
            return _plain(args[:words]), command, args[words:]
        if ctx.resilient_parsing or args[0].startswith("-"):
            return super().resolve_command(ctx, args)
        raise click.UsageError(self._unknown(args), ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, text in self._shown() if name in self.modules])
        if not self.prefix:
            with formatter.section("Groups"):
                formatter.write_dl(list(GROUPS.items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete without an import."""
        names = [CompletionItem(name, help=text) for name, text in self._shown() if name.startswith(incomplete)]
        return [
            *(each for each in names if " " not in each.value),
            *click.Command.shell_complete(self, ctx, incomplete),
        ]

    def _shown(self) -> Iterator[tuple[str, str]]:
        for name, module in self.modules.items():
            yield name, _help_of(module)
        if not self.prefix:
            yield from GROUPS.items()

    def _unknown(self, args: list[str]) -> str:
        """Say that there is no such command, and which one is nearest: to ``regress`` and ``export.trt``, too."""
        known = [*COMMANDS, *GROUPS]
        typed = self.prefix + _plain(args[:1]).replace(".", " ").lower()
        near = [each for each in known if each.endswith(f" {typed}")]
        near = near or difflib.get_close_matches(self.prefix + _plain(args[:2]).lower(), known, 1)
        near = near or difflib.get_close_matches(typed, known, 1)
        hint = f"Did you mean '{PROGRAM} {near[0]}'?" if near else f"'{PROGRAM} --help' lists all."
        return f"There is no command '{PROGRAM} {self.prefix}{printable(args[0])}'. {hint}"


def _plain(words: list[str]) -> str:
    return " ".join(words).replace("-", "_")


def _load(module: str) -> click.Command:
    """Import a command. Raises InputError where its package is not installed, as on a device."""
    try:
        command = import_module(module).main
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:
            raise
        raise InputError(
            f"the package '{error.name}' is not installed in {ROOT}, which has only what judging needs. Install the "
            "rest: pip install safevlm-edge."
        ) from error
    if not isinstance(command, click.Command):
        raise TypeError(f"{module}.main is not a click command")
    return command


def _help_of(module: str) -> str:
    """Return the first paragraph of a command's help out of its source."""
    file = ROOT / f"{module.replace('.', '/')}.py"
    if not file.is_file():
        return "(not installed)"
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == "main":
            first = inspect.cleandoc(ast.get_docstring(node) or "").partition("\n\n")[0]
            return " ".join(first.split())
    return ""
