"""A report is whole or not there, its JSON is strict, and a large one is quick and small."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.comparison.findings import Findings
from benchmarks.report.write import write_report
from safevlm.errors import InputError, MissingExtraError, SafeVLMError
from tests.benchmarks.report.sample_findings import sample_findings

FILES = {"report.html", "report.json", "report.md", "junit.xml"}
LARGE = """
import sys, time
from pathlib import Path
from dataclasses import replace
start = time.process_time()
from benchmarks.report.write import write_report
from safevlm.machine import peak_rss
from tests.benchmarks.report.sample_findings import sample_findings
from tests.benchmarks.report.sample_parts import flips
found = sample_findings(judges=2)
found = replace(found, flips=tuple(replace(flip, after=(flip.after or "") + 600 * "word ") for flip in flips(1500)))
found = replace(found, lines=(*found.lines, *(replace(found.lines[-1], key=f"more/{n}") for n in range(40))))
begun = time.process_time()
page = write_report(found, Path(sys.argv[1]))
print(time.process_time() - start, peak_rss(), page.stat().st_size)
"""


def as_json(findings: Findings) -> Any:
    return json.loads(json.dumps(findings.to_json()))


def test_a_report_is_four_files_and_its_page_is_returned(tmp_path: Path) -> None:
    page = write_report(sample_findings(), tmp_path / "deep" / "report")
    assert page == tmp_path / "deep" / "report" / "report.html"
    assert {path.name for path in page.parent.iterdir()} == FILES
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report"]
    assert page.parent.stat().st_mode & 0o777 == 0o777 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_what_exists_is_not_written_over(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "report"
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.write_text("mine", encoding="utf-8")
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"report already exists\. Give --out a new folder"):
        write_report(sample_findings(), out)
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    findings = sample_findings()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
        with pytest.raises(InputError, match=r"cannot be written: the file would be larger .* Nothing was left behind"):
            write_report(findings, tmp_path / "report")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_is_a_file_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="cannot be written"):
        write_report(sample_findings(), tmp_path / "file" / "report")


@pytest.mark.parametrize("verdict", ["PASS", "REGRESSION", "INCONCLUSIVE", "ANOMALOUS"])
def test_json_holds_all_findings_and_is_strict(tmp_path: Path, verdict: Any) -> None:
    findings = replace(sample_findings(verdict, judges=2), seed=11)
    data = (write_report(findings, tmp_path / "report").parent / "report.json").read_bytes()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    read = json.loads(data.decode("utf-8"), parse_constant=refuse)
    assert read["verdict"] == verdict and read["exit_code"] == findings.exit_code and read["schema_version"] == 1
    assert read["seed"] == 11
    # Half a surrogate pair is all that is replaced: many readers refuse a file that has one.
    want = json.loads(re.sub(r"\\ud[89ab]..(?!\\u)", r"\\ufffd", json.dumps(as_json(findings))))
    assert read == want


def test_a_figure_that_is_no_number_is_refused_by_its_place(tmp_path: Path) -> None:
    findings = sample_findings()
    lines = (findings.lines[0], replace(findings.lines[1], interval=(0.0, float("nan"))), *findings.lines[2:])
    with pytest.raises(SafeVLMError, match=r"findings\.lines\[1\]\.interval\[1\] \(nan\)"):
        write_report(replace(findings, lines=lines), tmp_path / "report")
    assert list(tmp_path.iterdir()) == []


def test_the_same_findings_give_the_same_bytes(tmp_path: Path) -> None:
    one, other = (write_report(sample_findings(judges=2), tmp_path / name).parent for name in ("one", "other"))
    for name in FILES:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize(
    ("library", "package"), [("jinja2", "jinja2"), ("matplotlib", "matplotlib"), ("yaml", "pyyaml")]
)
def test_a_missing_library_names_the_extra(
    tmp_path: Path, library: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=rf"the report needs the package '{package}'.*\[report\]"):
        write_report(sample_findings(), tmp_path / "report")
    assert list(tmp_path.iterdir()) == []


def test_findings_with_next_to_nothing_still_make_a_report(tmp_path: Path) -> None:
    page = write_report(Findings(verdict="ANOMALOUS", reasons=("Nothing fits.",)), tmp_path / "report")
    text = page.read_text(encoding="utf-8")
    assert "No measure with a margin could be computed." in text and "No sample changed." in text


def test_a_large_report_is_quick_and_small(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", LARGE, str(tmp_path / "report")],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, peak, size = map(float, done.stdout.split())
    assert seconds <= 10  # of one core
    assert peak <= 2**30
    assert size < 5_000_000
