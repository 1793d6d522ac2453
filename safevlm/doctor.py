"""What is installed, and what is missing for what: ``safevlm doctor``, or ``python -m safevlm.doctor``."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from safevlm.imports.siblings import PACKAGES, ROOT, hiding
from safevlm.installed.libraries import CORE, EXTRAS, JUDGING, Library, clashes, core_libraries, library
from safevlm.installed.machine_parts import Gpus, Place, find_gpus, find_places
from safevlm.machine import machine_name
from safevlm.terminal.commandline import printable, run
from safevlm.terminal.options import json_option
from safevlm.version import VERSION

__all__ = ["Findings", "find", "main"]

NOT_WORKING = 1


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that ``doctor`` reports. ``hidden`` maps packages of ours to what ``python -m`` finds in their place here."""

    version: str
    folder: str
    python: str
    executable: str
    platform: str
    machine: str
    core: tuple[Library, ...]
    extras: dict[str, tuple[Library, ...]]
    packages: tuple[str, ...]
    hidden: dict[str, str]
    gpus: Gpus
    places: tuple[Place, ...]
    notes: tuple[str, ...]

    @property
    def works(self) -> bool:
        """Whether the core works: the libraries that every command needs."""
        return all(each.state == "ok" for each in self.core)

    def has(self, extra: str) -> bool:
        """Return whether all libraries of an extra are there."""
        return all(each.state == "ok" for each in self.extras[extra])


def find() -> Findings:
    """Look at this machine. Nothing that is broken raises: it is reported."""
    extras = {
        name: tuple(library(each, needs) for each, needs in (*extra.needs.items(), *extra.system.items()))
        for name, extra in EXTRAS.items()
    }
    return Findings(
        version=VERSION,
        folder=str(ROOT),
        python=platform.python_version(),
        executable=sys.executable,
        platform=platform.platform(),
        machine=machine_name(),
        core=tuple(core_libraries()),
        extras=extras,
        packages=tuple(name for name in PACKAGES if (ROOT / name / "__init__.py").is_file()),
        hidden=_hidden(),
        gpus=find_gpus(),
        places=tuple(find_places()),
        notes=tuple(clashes()),
    )


def _hidden() -> dict[str, str]:
    try:
        here = Path(os.getcwd())  # noqa: PTH109
    except OSError:  # a folder that is gone hides nothing
        return {}
    found = {name: hiding(name, here) for name in PACKAGES if (ROOT / name).is_dir()}
    return {name: str(path) for name, path in found.items() if path is not None}


@click.command(name="doctor")
@json_option("the findings")
def main(as_json: bool) -> int:
    """Report what is installed, which extras are missing for what, GPUs, disk space and hidden packages.

    Exits with 0 when the core works, whatever extras are missing, and with 1 otherwise.
    """
    findings = find()
    if as_json:
        click.echo(json.dumps({"works": findings.works, **asdict(findings)}, indent=1))
    else:
        click.echo(printable("\n".join(_lines(findings))))
    return 0 if findings.works else NOT_WORKING


def _lines(findings: Findings) -> Iterator[str]:
    yield f"Safe-VLM Edge {findings.version} in {findings.folder}"
    yield f"Python {findings.python} at {findings.executable}"
    yield f"{findings.platform}, {findings.machine}"
    yield ""
    yield from _libraries(findings)
    yield ""
    for gpu in findings.gpus.found:
        yield f"GPU: {gpu.name}, {gpu.memory_mib} MiB, driver {gpu.driver}"
    if findings.gpus.note is not None:
        yield f"GPU: none found; {findings.gpus.note}"
    for place in findings.places:
        free = "" if place.free_bytes is None else f", {place.free_bytes / 2**30:.1f} GiB free"
        yield f"{place.purpose}: {place.path}{free}{f', {place.problem}' if place.problem else ''}"
    for name, path in findings.hidden.items():
        yield f"hidden: {path} hides the package '{name}' from python -m {name}…; run safevlm {name} … instead"
    yield from (f"note: {note}" for note in findings.notes)


def _libraries(findings: Findings) -> Iterator[str]:
    """Return a line for the core and each extra: what it is for, and what is there or to be installed."""
    wide = max(len(extra.purpose) for extra in EXTRAS.values())
    again = f"pip install --force-reinstall {' '.join(CORE)}"
    told = _found(findings.core) if findings.works else f"{_lacking(findings.core)}: {again}"
    yield f"{'ok' if findings.works else 'no':4}{'core':{wide}}  {told}"
    for name, extra in EXTRAS.items():
        libraries, has = findings.extras[name], findings.has(name)
        hint = f"; {extra.hint}" if extra.hint else ""
        told = _found(libraries) if has else f"{_lacking(libraries)}: pip install 'safevlm-edge[{name}]'{hint}"
        yield f"{'ok' if has else 'no':4}{extra.purpose:{wide}}  {told}"
    if not any(findings.has(name) for name in JUDGING):
        yield "No runtime is installed, so no image can be judged. Start with: pip install 'safevlm-edge[cpu]'"


def _found(libraries: tuple[Library, ...]) -> str:
    return ", ".join(f"{each.name} {each.version or '(version unknown)'}" for each in libraries)


def _lacking(libraries: tuple[Library, ...]) -> str:
    """Return what is wrong with each library that is not as it should be."""
    told = []
    for each in libraries:
        if each.state == "unfit":
            told.append(f"{each.name} {each.version} does not fit {each.needs}")
        elif each.state != "ok":
            told.append(f"{each.name} is {each.state}{f' ({each.problem})' if each.problem else ''}")
    return ", ".join(told)


if __name__ == "__main__":
    run(main)
