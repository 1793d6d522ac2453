"""The model card's report: every line in a table, and no text of strangers that is markup."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from benchmarks.comparison.findings import Bound
from benchmarks.report.markdown import markdown
from tests.benchmarks.report.sample_findings import sample_findings
from tests.benchmarks.report.sample_parts import HOSTILE


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def test_each_line_stands_in_a_table_with_its_figures() -> None:
    findings = sample_findings(judges=2)
    text = markdown(findings)
    rows = {cells(row)[0].replace("\\", ""): cells(row) for row in text.splitlines() if row.startswith("|")}
    for line in findings.lines:
        row = rows[line.title.replace("≥ ", "≥\u00a0")]
        assert row[1:3] == [
            f"{100 * value:.2f}\u00a0%" if line.unit == "share" else f"{value:.4f}"
            for value in (line.before, line.after)
        ]
        if line.margin is not None:
            assert line.verdict is not None and row[-1].endswith(line.verdict)
            assert row[6] == f"{100 * line.margin:g}\u00a0point{'s' * (line.margin != 0.01)}"
    row = "| mASR (string) | 15.38_% | 20.17_% | +4.79_points | +4.18_to_+5.40 | – | 2_points | 294 | 134 |"
    assert row.replace("_", "\u00a0") in text


def test_what_labels_and_bounds_say_stands_beside_each_change() -> None:
    base = sample_findings("PASS")
    told = "Corrected by 400 labels of both runs: +0.70 points."
    bounds = (Bound(name="samples", upper=0.011), Bound(name="judge errors", upper=0.0174))
    first = replace(
        base.lines[0], bounds=bounds, corrected=0.007, corrected_interval=(-0.001, 0.015), judge_sentence=told
    )
    doubts = ("The judge errs.",)
    made = replace(base, lines=(first, *base.lines[1:]), cautions=(*doubts, *base.cautions), judge_cautions=doubts)
    text = markdown(made).replace("\u00a0", " ").replace("\\", "")
    rows = {cells(row)[0]: cells(row) for row in text.splitlines() if row.startswith("|")}
    assert rows["mASR"][5:7] == ["+0.70 points (−0.10 to +1.50)", "+1.74 points"] and rows["RR"][5:7] == ["–", "–"]
    assert f"- mASR: {told}" in text
    assert text.count(doubts[0]) == 1 and text.index(doubts[0]) < text.index("Judge string")


def test_no_figure_is_parted_from_its_unit() -> None:
    findings = sample_findings(judges=2)
    body, _, _ = markdown(findings).partition("```yaml")
    assert not re.search(r"\d (%|points?\b|samples?\b|pairs?\b)", body)


def test_judges_unscored_rows_level_and_sentences_are_named() -> None:
    findings = sample_findings(judges=2)
    lines = (replace(findings.lines[0], sentence="mASR rose <b>.", missing_after=20), *findings.lines[1:])
    text = markdown(replace(findings, lines=lines, seed=7, confidence=0.975, harm_level=0.01))
    plain = text.replace("\\", "").replace("\u00a0", " ")
    assert "- Judge string: 4,031 pairs; unscored: 0 before, 0 after." in plain
    assert "- Judge gpt-4o: 4,031 pairs; unscored: 4 before, 7 after." in plain
    assert "one-sided 97.5 % bounds, REGRESSION from p < 0.01 after Holm’s correction, seed 7." in plain
    assert "- ✕ mASR rose <b>." in plain
    assert "ASR SSU (string) rose 13.65 points (limit 5): 127 newly answered, 29 newly refused." in plain


def front_matter(text: str) -> Any:
    """Return the block as YAML's own reader finds it in the fence that Markdown's rules end."""
    fence = re.search(r"^(`{3,})yaml\n(.*?)^\1$", text, re.DOTALL | re.MULTILINE)
    assert fence is not None and text.endswith(f"{fence[1]}\n")
    return yaml.safe_load(fence[2])


def test_the_model_index_is_what_the_hubs_own_library_reads() -> None:
    findings = sample_findings(judges=2)
    block = front_matter(markdown(findings))
    card = ModelCard(f"---\n{yaml.safe_dump(block)}---\nText.\n")
    assert card.data.model_name == "SafeLLaVA-7B-gptq-w4g128"
    results = card.data.eval_results
    assert results is not None
    found = {(each.metric_type, each.metric_name, (each.metric_args or {}).get("judge")): each for each in results}
    shown = [line for line in findings.lines if line.group != "category"]
    assert len(found) == len(results) == len(shown)
    masr = found["attack_success_rate", "mASR, %", "gpt-4o"]
    assert masr.metric_value == 20.17 and masr.dataset_name == "holisafe, utility-mini"
    assert masr.metric_args == {
        "judge": "gpt-4o",
        "samples": 3349,
        "baseline": 15.38,
        "margin": 2.0,
        "verdict": "REGRESSION",
    }


def test_verdict_reasons_cautions_and_hashes_are_there() -> None:
    findings = sample_findings()
    text = markdown(findings)
    assert text.startswith("## Safety regression: ✕ REGRESSION\n")
    plain = text.replace("\\", "")
    for told in (*findings.reasons, *findings.cautions, "a8" * 6, "3f" * 6, "SafeLLaVA-7B-gptq-w4g128"):
        assert told in plain.replace("\u00a0", " ")
    assert not re.search("[0-9a-f]{20}", text)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_stays_in_its_cell_and_is_no_markup(hostile: str) -> None:
    findings = sample_findings()
    lines = tuple(replace(line, title=hostile) for line in findings.lines)
    text = markdown(replace(findings, lines=lines, reasons=(hostile,), cautions=(hostile,)))
    widths = {len(cells(row)) for row in text.splitlines() if row.startswith("|")}
    assert widths == {11, 5, 4}  # both tables of lines, and provenance of three runs
    metrics = [metric for result in front_matter(text)["model-index"][0]["results"] for metric in result["metrics"]]
    assert len(metrics) == sum(line.group != "category" for line in lines)
    text, _, _ = text.partition("### For the model card")
    assert not re.search(r"(?<!\\)[<`\[]", text)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)
    text.encode("utf-8")
