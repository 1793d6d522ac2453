"""Commands that open a stand-in say so in a line on standard error, and answer as they do else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from runtimes import chat, check
from runtimes.gate import __main__ as gate_command
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.checkpoint.configs.processor_config import read_processor
from safevlm.contract.manifest import Source
from safevlm.terminal.commandline import run
from tests.runtimes.bundles import GREEN, guard_file_for, manifest_of, picture, write_bundle
from tests.safevlm.checkpoint.random_checkpoints import stand_in

GUARD = "warning: the guard in {} has random weights: its verdicts mean nothing\n"
MODEL = "warning: the model that answers has random weights: answers and verdicts mean nothing\n"


def ended(command: click.Command, *arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        run(command, [str(each) for each in arguments])
    return int(end.value.code or 0)


def source(*, marked: bool, standalone: bool = True) -> Source:
    return Source(
        checkpoint="tiny-safegem", sha256="0" * 64, family="gemma3", standalone=standalone, random_weights=marked
    )


@pytest.mark.parametrize("marked", [True, False])
def test_check_says_so_and_judges(marked: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_bundle(tmp_path / "bundle", source=source(marked=marked))
    assert ended(check.main, bundle, picture(tmp_path / "safe.png", GREEN), "--json") == 0
    printed = capsys.readouterr()
    assert printed.err == (GUARD.format(bundle) if marked else "")
    assert json.loads(printed.out)[0]["verdict"] == "allow"


@pytest.mark.parametrize(("guard", "model"), [(True, True), (True, False), (False, True), (False, False)])
def test_the_gate_says_which_of_its_parts_are_random(
    guard: bool, model: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bundle holds a guard behind the language model: nothing of it runs."""
    checkpoint = open_checkpoint("tiny-safegem")
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    preprocessing = read_processor(checkpoint.processor, family="gemma3")
    manifest = manifest_of(
        [guard_file_for(bundle, len(checkpoint.classes), preprocessing)],
        classes=checkpoint.classes,
        preprocessing=preprocessing,
        source=source(marked=guard, standalone=False),
    )
    manifest.write(bundle)
    answers = stand_in(checkpoint.folder, tmp_path / "model") if model else "tiny-safegem"
    image = picture(tmp_path / "image.png", GREEN)
    arguments = (image, "--bundle", bundle, "--model", answers, "--question", "Why?", "--max-new-tokens", 2)
    assert ended(gate_command.main, *arguments, "--json") in (0, 10)
    printed = capsys.readouterr()
    assert printed.err == (GUARD.format(bundle) if guard else "") + (MODEL if model else "")
    json.loads(printed.out)


def test_chat_says_so_of_gguf_files(
    gguf_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "gguf"
    shutil.copytree(gguf_folder("tiny-safegem"), folder)
    stated = json.loads((folder / "gguf.json").read_text())
    stated["source"]["random_weights"] = True
    (folder / "gguf.json").write_text(json.dumps(stated))
    image = picture(tmp_path / "image.png", GREEN)
    for model, said in ((folder, MODEL), (gguf_folder("tiny-safegem"), "")):
        ended(chat.main, "--model", model, image, "Why?", "--max-new-tokens", 2)
        assert capsys.readouterr().err == said
