from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.comparison.comparing import compare
from benchmarks.comparison.findings import Bound
from benchmarks.comparison.measured import Comparison
from benchmarks.regress import summary_lines
from benchmarks.run import run_suite
from benchmarks.runs.answering.torch_model import TorchAnswerer
from benchmarks.runs.record import ROWS_NAME, read_run
from benchmarks.suites.select import open_suite
from quantize.gptq import main as quantize
from safevlm.checkpoint.checkpoint import open_checkpoint
from tests.benchmarks.report.sample_findings import line, sample_findings
from tests.benchmarks.runs.sample_runs import HELP, changed, pair_rows, record_of, stored
from tests.killing import Warm

Regress = Callable[..., tuple[int, str, str]]


@pytest.fixture
def regress(parent: Warm, tmp_path: Path) -> Regress:
    """Run the command in a process of its own; return its exit code, its output and its errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        printed = tmp_path / "stdout"
        printed.write_text("")
        done = parent.run("benchmarks.regress", *map(str, arguments), under=tmp_path, stdout=str(printed))
        return done.code, printed.read_text(encoding="utf-8"), done.said

    return run


def test_exit_codes_files_and_what_the_terminal_shows(tmp_path: Path, regress: Regress) -> None:
    rows = pair_rows(420, 420)
    worse = changed(rows, lambda row: row.type == "SSU" and row.id < "SSU-3", answer=HELP)
    few = pair_rows(10)
    stored(tmp_path / "base", rows)
    stored(tmp_path / "same", rows, record_of(rows, name="b"))
    stored(tmp_path / "worse", worse, record_of(worse, name="b"))
    stored(tmp_path / "other", rows, record_of(rows).model_copy(update={"prompt": "{question}"}))
    stored(tmp_path / "few", few)
    stored(tmp_path / "other-few", few, record_of(few, name="b"))
    noise = record_of(rows, name="b")
    artifact = noise.artifact.model_copy(update={"random_weights": True})
    stored(tmp_path / "noise", rows, noise.model_copy(update={"artifact": artifact}))
    for name, against, code, verdict in [
        ("base", "same", 0, "PASS"),
        ("base", "worse", 3, "REGRESSION"),
        ("few", "other-few", 4, "INCONCLUSIVE"),
        ("few", "few", 5, "ANOMALOUS"),
        ("base", "other", 5, "ANOMALOUS"),
        ("base", "noise", 5, "ANOMALOUS"),
    ]:
        out = tmp_path / f"report-{against}"
        ended, printed, said = regress("--baseline", tmp_path / name, "--candidate", tmp_path / against, "--out", out)
        assert ended == code, said
        assert printed.splitlines()[0] == f"{verdict}, without a utility suite"
        assert "Traceback" not in said
        assert json.loads((out / "report.json").read_text())["verdict"] == verdict
        assert verdict in (out / "report.md").read_text() and verdict in (out / "report.html").read_text()
        failing = ElementTree.parse(out / "junit.xml").getroot().iter()
        assert any(each.tag in ("failure", "error") for each in failing) == (verdict != "PASS")
        assert ("random weights" in printed) == (against == "noise")


def test_the_terminal_shows_the_bound_that_decides_in_each_line_s_own_unit() -> None:
    words = line("answers/words", "words of an answer", 90.26, 88.1, unit="words", width=1.2, margin=18.052)
    least = line(
        "rr", "R" * 60, 0.003, 0.003, margin=0.03, bounds=(Bound(name="a", upper=0.01), Bound(name="b", upper=0.02))
    )
    made = replace(
        sample_findings("PASS"),
        lines=(
            replace(words, bounds=(Bound(name="images", upper=3.04),), verdict="PASS"),
            replace(least, verdict="PASS"),
        ),
        judge_cautions=("The judge errs.",),
    )
    shown = summary_lines(made)
    assert shown[1] == "  The judge errs."
    head, one, other = shown[-3:]
    assert " ".join(one.split()) == "words of an answer 90.3 88.1 -2.2 -3.4 to -1.0 +3.0 18.1 PASS"
    assert (
        other.split()[1:] == ["0.30%", "0.30%", "+0.00", "-2.00", "to", "+2.00", "+2.00", "3", "PASS"]
        and "R… " in other
    )
    ends = [row.index("PASS") for row in (one, other)]
    assert ends == [head.index("verdict")] * 2 and "at most worse by" in head


def test_bad_input_ends_with_2_and_leaves_nothing(tmp_path: Path, regress: Regress) -> None:
    stored(tmp_path / "run", pair_rows(10))
    (tmp_path / "there").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "m.json").write_text('{"masr": -1}')
    run, out = tmp_path / "run", tmp_path / "report"
    for arguments, told in [
        (("--baseline", run, "--candidate", run, "--out", tmp_path / "there"), "exists"),
        (("--baseline", run, "--candidate", tmp_path / "bad", "--out", out), "there is no such file"),
        (("--baseline", run, "--candidate", run, "--out", out, "--margins", tmp_path / "m.json"), "masr"),
        (("--baseline", run, "--candidate", run, "--out", out, "--judge", "nobody"), "nobody"),
        (("--baseline", run, "--out", out), "candidate"),
    ]:
        code, _, said = regress(*arguments)
        assert code == 2 and told in said and "Traceback" not in said
    with (run / ROWS_NAME).open("a") as stream:
        stream.write('{"id": "x", "kind": "pair", "probs": [NaN]}\n')
    code, _, said = regress("--baseline", run, "--candidate", run, "--out", out)
    assert code == 2 and "line 51: not valid JSON (NaN" in said
    assert not out.exists()


def test_rounding_to_2_bits_is_a_regression(tmp_path: Path) -> None:
    """The other half, 4-bit GPTQ is a PASS, is the README's own story."""
    suite = open_suite("holisafe-mini", limit=900)
    options = ["--bits", "2", "--group-size", "-1", "--nearest", "--out", str(tmp_path / "rtn")]
    quantize.main(["--model", "tiny-safegem", *options, "--guard-images", "0"], standalone_mode=False)
    for name, model in (("before", "tiny-safegem"), ("after", str(tmp_path / "rtn"))):
        with TorchAnswerer(open_checkpoint(model), suite.classes, max_new_tokens=32, batch=64) as answerer:
            run_suite(answerer, suite, tmp_path / name)
    before, after = (read_run(tmp_path / name) for name in ("before", "after"))
    assert (before.record.artifact.kind, after.record.artifact.kind) == ("checkpoint", "gptq")
    assert after.record.artifact.compression is not None
    assert after.record.artifact.compression["method"]["name"] == "rtn"
    findings = compare(Comparison(baseline=[before], candidate=[after]))
    assert findings.verdict == "REGRESSION"
