"""What the page says before its tables: the judges' doubts, each line's sentence, margins, what an import noted."""

from __future__ import annotations

import re
from dataclasses import replace

from benchmarks.comparison.margins import Margins
from benchmarks.report.markdown import markdown
from benchmarks.report.page import TOLD, page
from tests.benchmarks.report.sample_findings import sample_findings
from tests.benchmarks.report.test_page import Read


def test_what_the_judges_leave_open_stands_first_in_the_banner_and_only_there() -> None:
    doubts = ("String matching may misread these models’ refusals.", "PASS fails when it errs in 3.1 % of the answers.")
    base = sample_findings("PASS")
    findings = replace(base, cautions=(*doubts, *base.cautions), judge_cautions=doubts)
    text = " ".join(Read(page(findings)).text.replace("\u00a0", " ").split())
    places = [text.index(told) for told in (base.verdict, *doubts, base.reasons[0], base.cautions[0])]
    assert places == sorted(places) and all(text.count(doubt) == 1 for doubt in doubts)


def test_a_line_says_what_labels_make_of_its_change() -> None:
    base = sample_findings("PASS")
    told = "Corrected by 400 labels of both runs: +0.70 points, -0.10 to +1.50."
    first = replace(base.lines[0], corrected=0.007, corrected_interval=(-0.001, 0.015), judge_sentence=told)
    second = replace(base.lines[1], reason=f"The judge errs. {told}", judge_sentence=told)
    text = " ".join(Read(page(replace(base, lines=(first, second)))).text.replace("\u00a0", " ").split())
    assert text.count(told) == 2  # a reason that has said it is not repeated
    assert text.count("corrected +0.70 points −0.10 to +1.50") == 1


def test_the_banner_tells_of_every_line_and_folds_away_only_what_passes() -> None:
    base = sample_findings("INCONCLUSIVE")
    own = [line for line in base.lines if line.margin is not None]
    many = tuple(replace(line, key=f"{line.key}/{n}", title=f"{line.title} {n}") for n in range(3) for line in own)
    made = page(replace(base, lines=many))
    banner = made.partition("</header>")[0]
    open_, _, folded = banner.partition("further lines that pass")
    links = [re.findall(r'href="#line-(\d+)"', part) for part in (open_, folded)]
    assert sorted(map(int, links[0] + links[1])) == list(range(1, len(many) + 1))
    assert all(many[int(place) - 1].verdict == "PASS" for place in links[1])
    assert len(links[0]) == max(TOLD, sum(line.verdict != "PASS" for line in many)) < len(many)


def test_margins_have_their_own_units() -> None:
    made = page(replace(sample_findings(), margins=Margins(masr=1).model_dump(mode="json")))
    terms = re.findall(r"<div><dt>([^<]*)</dt><dd>([^<]*)</dd></div>", made.partition("Margins and limits of")[2])
    found = dict(terms)
    assert len(found) == len(Margins.model_fields)
    assert found["mASR"] == "1 point" and found["guard recall and FPR of each class"] == "10 points"
    assert found["guard recall under each corruption"] == "left out"
    percent = [size for name, size in terms if size.endswith(" %")]
    assert percent == ["20 %", "95 %", "0.5 %"] and found["harm is shown where p, after Holm, is below"] == "0.05"


def test_what_an_imported_log_says_of_itself_is_shown() -> None:
    base = sample_findings()
    notes = ["The log does not name images.", "Two rows differ."]
    run = {**base.baseline[0], "scored_by": "lmms-eval, task holisafe", "notes": notes}
    findings = replace(base, baseline=(run,))
    for told in (page(findings), markdown(findings)):
        plain = told.replace("\u00a0", " ").replace("\\", "")
        assert all(each in plain for each in (*notes, "lmms-eval, task holisafe"))
