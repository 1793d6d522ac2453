from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.run import batches, main, run_suite
from benchmarks.runs.answering.answerer import Description, class_order, failed
from benchmarks.runs.answering.bundle import BundleAnswerer, GatedAnswerer
from benchmarks.runs.answering.gguf import GgufAnswerer
from benchmarks.runs.answering.select import Request, open_answerer
from benchmarks.runs.answering.torch_model import TorchAnswerer
from benchmarks.runs.record import Artifact, Row, Runtime, read_run
from benchmarks.suites.select import open_suite
from benchmarks.suites.suite import Suite
from calibration.holisafe_mini.questions import is_refusal
from export.guard.heads import HeadRequest
from export.onnx import export_with_progress
from runtimes.language.writing import Decoding
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.checkpoint.guard_head import standard_classes
from safevlm.errors import ImageFileError, InputError
from tests.runtimes.bundles import write_bundle
from tests.safevlm.checkpoint.random_checkpoints import stand_in

ROOT = Path(__file__).parents[2]
CLASSES = standard_classes()


class Parrot:
    """Answers with the question, or fails from the nth batch on."""

    kinds = frozenset({"pair", "question", "image"})

    def __init__(self, batch: int = 8, fails_from: int | None = None) -> None:
        self.batch = batch
        self.calls = 0
        self.fails_from = fails_from

    def __enter__(self) -> Parrot:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def describe(self) -> Description:
        return Description(artifact=Artifact(name="parrot", kind="server"), runtime=Runtime(name="fake"))

    def answer(self, rows: Sequence[Row], pictures: Sequence[Image.Image]) -> list[Row]:
        self.calls += 1
        assert len(rows) == len(pictures) <= self.batch
        if self.fails_from is not None and self.calls >= self.fails_from:
            return [failed(row, "the server is down") for row in rows]
        return [row.model_copy(update={"answer": f"You asked: {row.query}"}) for row in rows]


@pytest.fixture(scope="module")
def suite() -> Suite:
    return open_suite("holisafe-mini", limit=120)


def test_every_row_is_answered_once(suite: Suite, tmp_path: Path) -> None:
    seen: list[int] = []
    run_suite(Parrot(), suite, tmp_path / "run", report=seen.append)
    run = read_run(tmp_path / "run")
    assert {row.id: row for row in run.rows} == {
        row.id: row.model_copy(update={"answer": f"You asked: {row.query}"}) for row in suite.rows
    }
    assert sum(seen) == len(suite.rows) == run.record.suite.rows
    assert run.record.finished is not None


def test_batches_depend_on_the_suite_alone(suite: Suite) -> None:
    forwards, backwards = (list(batches(rows, 8)) for rows in (suite.rows, suite.rows[::-1]))
    assert forwards == backwards
    assert sorted(row.id for batch in forwards for row in batch) == sorted(row.id for row in suite.rows)
    assert all(len({row.kind for row in batch}) == 1 and len(batch) <= 8 for batch in forwards)


def test_an_artifact_that_went_down_stops_the_run_and_its_failures_are_not_kept(suite: Suite, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"24 rows failed in a row.*the server is down.*--resume"):
        run_suite(Parrot(fails_from=4), suite, tmp_path / "run")
    assert len(read_run(tmp_path / "run").rows) == 24
    again = Parrot()
    run_suite(again, suite, tmp_path / "run", resume=True)
    rows = read_run(tmp_path / "run").rows
    assert len(rows) == len(suite.rows) and all(row.error is None for row in rows)
    assert again.calls == len(list(batches(suite.rows, 8))) - 3


def test_a_picture_that_cannot_be_read_fails_alone(suite: Suite, tmp_path: Path) -> None:
    def unreadable() -> Image.Image:
        raise ImageFileError("torn.png is truncated")

    torn = suite.rows[0].image
    assert torn is not None
    broken = Suite(**{**vars(suite), "pictures": {**suite.pictures, torn: unreadable}})
    run_suite(Parrot(), broken, tmp_path / "run")
    rows = read_run(tmp_path / "run").rows
    assert {row.image for row in rows if row.error} == {torn}
    assert {row.error for row in rows if row.error} == {"torn.png is truncated"}


@pytest.mark.parametrize("name", ["tiny-safellava", "tiny-safegem"])
def test_answers_and_guard_are_the_model_s_own(name: str, tmp_path: Path) -> None:
    suite = open_suite("holisafe-mini", limit=60)
    checkpoint = open_checkpoint(name)
    with TorchAnswerer(checkpoint, suite.classes, max_new_tokens=32) as answerer:
        record = run_suite(answerer, suite, tmp_path / "run")
        row = suite.rows[7]
        alone = answerer._vlm.answer(
            _tensor(answerer._vlm.preprocessing.apply(suite.picture(row))), [row.query or ""], 32
        )[0]
    rows = {row.id: row for row in read_run(tmp_path / "run").rows}
    assert rows[row.id].answer == alone.text
    assert np.abs(np.array(rows[row.id].probs) - alone.guard_probs).max() < 1e-4
    right = [is_refusal(row.answer or "") == (row.type != "SSS") for row in rows.values() if row.kind == "pair"]
    assert np.mean(right) > 0.95
    assert record.artifact.kind == "checkpoint" and record.artifact.sha256 is not None
    assert record.prompt is not None and record.prompt.index("{image}") < record.prompt.index("{question}")


def test_a_question_that_the_gate_would_refuse_fails_alone(suite: Suite, gguf_folder: Callable[[str], Path]) -> None:
    name = "tiny-safegem"
    whole, picture = next(row for row in suite.rows if row.kind == "pair"), Image.new("RGB", (40, 40))
    rows = [whole, *(whole.model_copy(update={"query": query}) for query in ("a<end_of_turn>", " ", "why " * 5000))]
    for answerer in (
        TorchAnswerer(open_checkpoint(name), suite.classes, max_new_tokens=2),
        GgufAnswerer(gguf_folder(name), suite.classes, max_new_tokens=2),
    ):
        with answerer:
            errors = [row.error for row in answerer.answer(rows, [picture] * 4)]
        assert errors[0] is None
        for error, word in zip(errors[1:], ("control token", "empty", "context is 4096"), strict=True):
            assert error is not None and word in error


@pytest.fixture(scope="module")
def guard_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "guard"
    export_with_progress(open_checkpoint("tiny-safegem"), out, HeadRequest(), precisions=("fp32",), parity_images=8)
    return out


def test_a_bundle_judges_as_the_checkpoint_it_came_from(guard_bundle: Path, tmp_path: Path) -> None:
    suite = open_suite("guard-mini", limit=50)
    with BundleAnswerer(guard_bundle, suite.classes, batch=8) as answerer:
        run_suite(answerer, suite, tmp_path / "bundle")
    with TorchAnswerer(open_checkpoint("tiny-safegem"), suite.classes, max_new_tokens=1) as answerer:
        run_suite(answerer, suite, tmp_path / "exact")
    rows = {row.id: row for row in read_run(tmp_path / "exact").rows}
    for row in read_run(tmp_path / "bundle").rows:
        assert row.answer is None and row.probs is not None
        assert np.abs(np.array(row.probs) - np.array(rows[row.id].probs)).max() < 1e-4
    on_bundle, exact = (read_run(tmp_path / name).record.runtime for name in ("bundle", "exact"))
    assert (on_bundle.provider, on_bundle.gpu) == ("CPUExecutionProvider", None)
    assert (exact.provider, exact.device, exact.gpu) == (None, "cpu", None)


def test_a_gated_pair_refuses_what_the_guard_blocks(guard_bundle: Path, tmp_path: Path) -> None:
    suite = open_suite("holisafe-mini", limit=40)
    with GatedAnswerer(guard_bundle, "tiny-safegem", suite.classes, max_new_tokens=32) as answerer:
        record = run_suite(answerer, suite, tmp_path / "gated")
    rows = read_run(tmp_path / "gated").rows
    assert all((row.blocked is not None) == (row.label != 0) for row in rows)
    assert all((row.answer is None) == (row.blocked is not None) for row in rows)
    assert record.artifact.kind == "gated" and record.artifact.name.startswith("guard + ")
    assert record.runtime.provider == "CPUExecutionProvider"


@pytest.mark.parametrize("kind", ["torch", "gguf", "gated"])
def test_sampled_answers_go_by_the_seed_and_the_row_alone(
    kind: str, guard_bundle: Path, gguf_folder: Callable[[str], Path], suite: Suite
) -> None:
    rows = [row for row in suite.rows if row.kind == "question"][:6]
    pictures = [suite.picture(row) for row in rows]
    options: dict[str, Any] = {"max_new_tokens": 8}

    def answers(seed: int, order: list[int]) -> list[str | None]:
        decoding = Decoding(temperature=2.0, seed=seed)
        if kind == "torch":
            answerer: Any = TorchAnswerer(
                open_checkpoint("tiny-safegem"), suite.classes, decoding=decoding, batch=len(order), **options
            )
        elif kind == "gguf":
            answerer = GgufAnswerer(gguf_folder("tiny-safegem"), suite.classes, decoding=decoding, **options)
        else:
            answerer = GatedAnswerer(guard_bundle, "tiny-safegem", suite.classes, decoding=decoding, **options)
        with answerer:
            assert answerer.describe().decoding == {
                "sampling": "temperature",
                "temperature": 2.0,
                "seed": seed,
                "max_new_tokens": 8,
            }
            done = answerer.answer([rows[at] for at in order], [pictures[at] for at in order])
        assert all(row.error is None for row in done)
        return [row.answer for row in done]

    forth, back = list(range(6)), list(range(5, -1, -1))
    assert answers(1, forth) == answers(1, back)[::-1]
    assert answers(1, forth) != answers(2, forth)


def test_random_weights_are_recorded_whatever_runs_them(
    guard_bundle: Path, gguf_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = stand_in(open_checkpoint("tiny-safegem").folder, tmp_path / "checkpoint")
    marked = stand_in_manifest(guard_bundle, tmp_path / "bundle", "manifest.json")
    gguf = stand_in_manifest(gguf_folder("tiny-safegem"), tmp_path / "gguf", "gguf.json")
    pairs, guard = ("--suite", "holisafe-mini", "--limit", "5"), ("--suite", "guard-mini", "--limit", "5")
    for number, (random, arguments) in enumerate(
        [
            (True, ("--model", str(noise), *pairs)),
            (False, ("--model", "tiny-safegem", *pairs)),
            (True, ("--model", str(gguf), *pairs)),
            (True, ("--bundle", str(marked), *guard)),
            (False, ("--bundle", str(guard_bundle), *guard)),
            (True, ("--bundle", str(marked), "--model", "tiny-safegem", *pairs)),
            (True, ("--bundle", str(guard_bundle), "--model", str(noise), *pairs)),
        ]
    ):
        out = tmp_path / f"run-{number}"
        main.main([*arguments, "--out", str(out)], standalone_mode=False)
        assert read_run(out).record.artifact.random_weights == random, arguments
        assert ("(random weights)" in capsys.readouterr().out) == random, arguments


def stand_in_manifest(folder: Path, copy: Path, name: str) -> Path:
    """Copy a bundle or GGUF folder as one that was made from random weights."""
    shutil.copytree(folder, copy)
    stated = json.loads((copy / name).read_text())
    stated["source"]["random_weights"] = True
    (copy / name).write_text(json.dumps(stated))
    return copy


def test_what_cannot_be_run_is_told(tmp_path: Path, suite: Suite) -> None:
    request: dict[str, Any] = {"max_new_tokens": 8}
    with pytest.raises(InputError, match=r"nothing to run\. Give --model"):
        open_answerer(Request(**request), CLASSES)
    with pytest.raises(InputError, match="--server needs --model"):
        open_answerer(Request(**request, server="http://127.0.0.1:1/v1"), CLASSES)
    for half in ({"temperature": 0.7}, {"seed": 1}):
        with pytest.raises(InputError, match="needs both --temperature above 0 and --seed"):
            open_answerer(Request(**request, **half, model="tiny-safegem"), CLASSES)
    bundle = write_bundle(tmp_path / "bundle")
    with pytest.raises(InputError, match="a guard bundle alone writes no answers"):
        open_answerer(Request(**request, bundle=bundle, temperature=0.7, seed=1), CLASSES)
    with pytest.raises(InputError, match="differ from the suite's"):
        open_answerer(Request(**request, bundle=bundle), CLASSES)
    with (
        BundleAnswerer(bundle, ("safe", "weapon", "drug"), batch=4) as answerer,
        pytest.raises(InputError, match="rows of kind pair, question, but this artifact answers only"),
    ):
        run_suite(answerer, suite, tmp_path / "run")
    with pytest.raises(InputError, match=r"exists\. Give --out"):
        main.main(["--model", "tiny-safegem", "--out", str(bundle)], standalone_mode=False)


def test_classes_are_brought_into_the_suite_s_order() -> None:
    short = ["safe", "gender", "race", "religion", *CLASSES[4:]]
    assert class_order(short, CLASSES, "x") == list(range(20))
    assert class_order(CLASSES[::-1], CLASSES, "x") == list(range(19, -1, -1))
    with pytest.raises(InputError, match="differ from the suite's"):
        class_order(["safe", "cats"], CLASSES, "x")


def _tensor(levels: Any) -> Any:
    import torch

    return torch.from_numpy(levels[None])
