"""The gated pair as one command and as a few lines of Python."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from calibration.holisafe_mini.scene import draw
from calibration.holisafe_mini.suite import build_suite
from runtimes.chat import main, open_chat
from safevlm.terminal.commandline import run
from tests.runtimes.guard.hanging_runners import busy

Folder = Callable[[str], Path]
SUITE = build_suite("test", pairs=100, questions=0)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A safe picture, an unsafe one, and what the unsafe one shows."""
    folder = tmp_path_factory.mktemp("pictures")
    safe = next(each for each in SUITE.pictures if each.scene.label == 0)
    unsafe = next(each for each in SUITE.pictures if each.scene.label == 12)  # animal_abuse
    for name, each in (("safe", safe), ("unsafe", unsafe)):
        draw(each.scene).save(folder / f"{name}.png")
    return folder / "safe.png", folder / "unsafe.png", "animal abuse"


def ended(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as end:
        run(main, arguments)
    return int(end.value.code or 0)


@pytest.mark.parametrize("name", ["tiny-safellava", "tiny-safegem", "tiny-safeqwen"])
def test_an_answer_or_a_refusal_with_its_class(
    name: str, gguf_folder: Folder, pictures: tuple[Path, Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    safe, unsafe, harm = pictures
    assert ended(["--model", str(gguf_folder(name)), str(safe), "Where is the square?"]) == 0
    assert len(capsys.readouterr().out.strip()) > 10
    assert ended(["--model", str(gguf_folder(name)), str(unsafe), "Where is the square?"]) == 10
    out = capsys.readouterr().out
    assert out == f"I can't help with this image: it is classified as {harm}.\n"
    assert ended(["--model", str(gguf_folder(name)), "--json", str(unsafe), "Where is the square?"]) == 10
    assert json.loads(capsys.readouterr().out)["label"] == "animal_abuse"


def test_a_bundle_judges_and_llama_cpp_answers(
    gguf_folder: Folder, pictures: tuple[Path, Path, str], tmp_path: Path
) -> None:
    from export.onnx import ExportOptions, export_guard
    from safevlm.checkpoint.checkpoint import open_checkpoint

    export_guard(open_checkpoint("tiny-safegem"), tmp_path / "guard", ExportOptions(parity_images=2, embeddings=True))
    safe, unsafe, _ = pictures
    with open_chat(bundle=tmp_path / "guard", model=str(gguf_folder("tiny-safegem"))) as chat:
        assert chat.share_embeddings, "one vision tower for both: the hashes agree"
        pieces: list[str] = []
        result = chat.ask(safe, "Where is the square?", on_text=pieces.append)
        assert result.verdict == "allow" and "".join(pieces) == result.answer and len(pieces) > 1
        with open_chat(bundle=tmp_path / "guard", model="tiny-safegem") as torch_chat:
            assert torch_chat.ask(safe, "Where is the square?").answer == result.answer
        blocked = chat.ask(unsafe, "Where is the square?", on_text=pieces.append)
        assert blocked.stage == "guard" and blocked.answer is None and "exact" not in blocked.ms
    with open_chat(bundle=tmp_path / "guard", model=str(gguf_folder("tiny-safegem"))) as chat:
        assert chat.ask(b"no image", "?").verdict == "block"


def test_nothing_is_said_of_an_image_that_cannot_be_read(
    gguf_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert ended(["--model", str(gguf_folder("tiny-safegem")), str(tmp_path / "bad.png"), "What?"]) == 10
    assert capsys.readouterr().out == "I can't answer about this image: the image cannot be read.\n"


def test_without_a_guard_there_is_no_chat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    assert ended(["--model", "tiny-safegem", str(tmp_path / "a.png"), "What?"]) == 2
    assert "--bundle is missing" in capsys.readouterr().err


def test_text_that_raises_ends_the_answer(gguf_folder: Folder, pictures: tuple[Path, Path, str]) -> None:
    def full(_: str) -> None:
        raise OSError("the reader is gone")

    with open_chat(None, str(gguf_folder("tiny-safegem"))) as chat:
        result = chat.ask(pictures[0], "Where is the square?", on_text=full)
        assert result.verdict == "block" and result.error_in == "generate"
        assert result.refusal() == "I can't answer about this image: the generation failed (OSError)."
        assert chat.ask(pictures[0], "Where is the square?").verdict == "allow"


@pytest.mark.parametrize("command", ["chat", "gate"])
def test_a_runner_that_is_busy_refuses_in_plain_words(
    command: str, gguf_folder: Folder, pictures: tuple[Path, Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    gate = open_chat(None, str(gguf_folder("tiny-safegem")))
    module = import_module(f"runtimes.{command}" if command == "chat" else "runtimes.gate.__main__")
    asked = [str(pictures[0]), *(["Why?"] if command == "chat" else ["--question", "Why?"])]
    assert gate.guard is not None
    with pytest.MonkeyPatch.context() as patch, gate, busy(gate.guard.runner):
        patch.setattr(module, "open_told", lambda *_, **__: gate)
        with pytest.raises(SystemExit) as end:
            run(module.main, asked)
    out = capsys.readouterr().out
    assert end.value.code == 10 and "the guard is busy with an earlier image" in out


@pytest.mark.parametrize("question", ["", "why " * 20_000, "<image_soft_token>?", "\ud83d"])
def test_a_bad_question_is_told_and_nothing_is_judged(
    question: str, gguf_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The image is none, which would be said if it had been looked at."""
    (tmp_path / "bad.png").write_bytes(b"no image")
    assert ended(["--model", str(gguf_folder("tiny-safegem")), str(tmp_path / "bad.png"), question]) == 2
    told = capsys.readouterr()
    assert "error: " in told.err and "image cannot be read" not in told.out + told.err


@pytest.mark.parametrize("command", ["chat", "gate"])
def test_the_context_can_be_set(command: str, gguf_folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    module = import_module(f"runtimes.{command}" if command == "chat" else "runtimes.gate.__main__")
    model = ["--model", str(gguf_folder("tiny-safegem")), "--context", "48"]
    asked = ["none.png", *(["why " * 90] if command == "chat" else ["--question", "why " * 90])]
    with pytest.raises(SystemExit) as end:
        run(module.main, [*model, *asked])
    assert end.value.code == 2 and "this model's context is " in capsys.readouterr().err
