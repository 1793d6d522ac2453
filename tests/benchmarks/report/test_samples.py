"""The changed samples in a real browser: stepping, veiled images, marked words, labels that are saved, and paper."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.comparison.comparing import Comparison, compare
from benchmarks.comparison.findings import Flip
from benchmarks.judges.labels import read_labels
from benchmarks.report.write import write_report
from tests.benchmarks.report.chromium import Chromium
from tests.benchmarks.report.sample_findings import sample_findings
from tests.benchmarks.report.sample_parts import HOSTILE, flips
from tests.benchmarks.runs.sample_runs import HELP, changed, pair_rows, record_of, stored

KEYS = {"ArrowRight": 39, "ArrowLeft": 37}
WORDS = ("alpha", "beta", "gamma", "delta,", "epsilon.", "日本語", "עברית")
OPEN = "[...document.querySelectorAll('.flip[open]')]"


def report_of(folder: Path, changed: Sequence[Flip], *, judges: int = 2, images: Path | None = None) -> Path:
    return write_report(replace(sample_findings(judges=judges), flips=tuple(changed)), folder / "report", images=images)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = tmp_path_factory.mktemp("images")
    changed = flips(40, ("string", "gpt-4o"))
    for name in {flip.image for flip in changed if flip.image}:
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), (200, 40, 40)).save(images / name)
    return report_of(tmp_path_factory.mktemp("samples"), changed, images=images)


@pytest.fixture
def opened(browser: Chromium, report: Path) -> Chromium:
    browser.show(report, width=1280, height=1000)
    browser.evaluate("localStorage.clear()")
    browser.show(report, width=1280, height=1000)
    return browser


def press(browser: Chromium, *keys: str) -> None:
    for key in keys:
        browser.press(key, code=KEYS.get(key, ord(key[0].upper())), text="" if key in KEYS else key)


def ids(browser: Chromium) -> Any:
    return browser.evaluate(f"{OPEN}.map(flip => JSON.parse(flip.dataset.name || 'null'))")


def test_keys_step_through_what_the_filter_leaves_and_stop_at_the_ends(opened: Chromium) -> None:
    order = opened.evaluate("[...document.querySelectorAll('.flip')].map(e => e.querySelector('.id').textContent)")
    current = f"{OPEN}.map(e => e.querySelector('.id').textContent)"
    press(opened, "j")  # from the top of the page: nothing has the focus yet
    assert opened.evaluate(current) == order[:1]
    assert opened.evaluate("document.activeElement.matches('.flip[open] > summary')")
    assert opened.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    press(opened, "j", "ArrowRight", "ArrowRight", "k")
    assert opened.evaluate(current) == order[2:3]
    press(opened, "ArrowLeft", "k", "k")
    assert opened.evaluate(current) == order[:1]
    assert "first sample" in opened.evaluate("document.getElementById('tour-place').textContent")
    opened.evaluate("document.getElementById('tour-next').click()")
    assert opened.evaluate("document.getElementById('tour-place').textContent") == "Sample 2 of 40"
    opened.evaluate("(e => { e.value = 'better'; e.dispatchEvent(new Event('change')) })(window['filter-way'])")
    press(opened, *"j" * 40)
    better = opened.evaluate("[...document.querySelectorAll('.flip:not([hidden]) > summary .id')].at(-1).textContent")
    assert opened.evaluate(current) == [better]
    assert "last sample" in opened.evaluate("document.getElementById('tour-place').textContent")
    assert opened.complaints == []


def test_the_opened_sample_is_in_view_and_not_below_the_bar(opened: Chromium) -> None:
    for width, height, keys in ((1280, 1000, "jjjj"), (360, 800, "jjjj"), (1280, 1000, "jkkjj"), (360, 800, "j")):
        opened.resize(width, height)
        opened.evaluate("scrollTo(0, document.documentElement.scrollHeight)")  # what was open is out of view
        opened.settle()
        press(opened, *keys)
        opened.settle()
        bar, top, bottom = opened.evaluate(
            "[window.tour.getBoundingClientRect().bottom, ...(box => [box.top, box.bottom])"
            "(document.activeElement.getBoundingClientRect())]"
        )
        assert bar <= top < bottom <= height
        assert opened.evaluate("document.documentElement.scrollWidth") <= width


def test_a_sample_far_away_is_brought_right_below_the_bar(opened: Chromium) -> None:
    opened.resize(360, 800)  # rows wrap here, so those passed over turn out taller than the page had assumed
    opened.settle()
    press(opened, "k")
    opened.settle()
    gap = opened.evaluate(
        "document.activeElement.getBoundingClientRect().top - window.tour.getBoundingClientRect().bottom"
    )
    assert 0 <= gap <= 40


def test_single_keys_do_nothing_in_fields_with_modifiers_or_when_off(opened: Chromium) -> None:
    opened.evaluate("document.getElementById('filter-text').focus()")
    press(opened, "j", "1")
    assert ids(opened) == []
    opened.evaluate("document.activeElement.blur()")
    opened.evaluate("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'j', ctrlKey: true, bubbles: true}))")
    opened.evaluate("document.getElementById('tour-keys').checked = false")
    press(opened, "j")
    assert ids(opened) == []


def test_tab_leaves_the_samples_by_itself(opened: Chromium) -> None:
    opened.evaluate("[...document.querySelectorAll('.samples > summary')].at(-1).focus()")
    opened.press("Tab", code=9)
    assert not opened.evaluate("document.getElementById('samples').contains(document.activeElement)")


def test_an_image_is_blurred_until_asked_for_and_again_on_the_next_one(opened: Chromium) -> None:
    blurred = f"{OPEN}.map(flip => getComputedStyle(flip.querySelector('img')).filter.includes('blur'))"
    press(opened, "j")
    assert opened.evaluate(blurred) == [True]
    press(opened, "i")
    assert opened.evaluate(blurred) == [False]
    press(opened, "j")
    assert opened.evaluate(blurred) == [True]
    press(opened, "k")
    assert opened.evaluate(blurred) == [True]
    opened.evaluate(f"{OPEN}[0].querySelector('.veil > summary').click()")
    assert opened.evaluate(blurred) == [False]


def test_marked_words_lose_nothing_and_what_is_not_marked_is_shared(opened: Chromium) -> None:
    rng = random.Random(5)
    texts = [*HOSTILE[:4], HOSTILE[6], "", "I can’t help with that.", "one two three four", "one two THREE four five"]
    texts += [" ".join(rng.choices(WORDS, k=60)) for _ in range(12)]
    pairs = [(one, other) for one in texts for other in rng.sample(texts, 5)] + [("word " * 5000, "other " * 5000)]
    found = opened.evaluate(
        f"""{json.dumps(pairs)}.map(pair => {{
          const ends = pair.map(text => Object.assign(document.createElement("p"), {{textContent: text}}));
          markWords(...ends);
          const shared = ends.map(end => [...end.childNodes].filter(node => node.nodeType === 3));
          return [ends.map(end => end.textContent), shared.map(nodes => nodes.map(node => node.data).join(""))];
        }})"""
    )
    for pair, (whole, shared) in zip(pairs, found, strict=True):
        assert whole == list(pair) and shared[0] == shared[1]
        assert pair[0] != pair[1] or shared[0] == pair[0]
    counts = opened.evaluate(
        "(ends => markWords(...ends))(['one two three four', 'one two THREE four five'].map(text =>"
        "Object.assign(document.createElement('p'), {textContent: text})))"
    )
    assert counts == {"removed": 2, "added": 3, "kept": 2}  # "four" alone between two changes is an island


def test_marks_do_not_rely_on_colour_and_can_be_switched_off(opened: Chromium) -> None:
    lines = "['del', 'ins'].map(tag => getComputedStyle(document.querySelector(`.words ${tag}`)).textDecorationLine)"
    press(opened, *"j" * 12)
    assert opened.evaluate(lines) == ["line-through", "underline"]
    opened.evaluate("document.getElementById('tour-marks').click()")
    assert opened.evaluate(lines) == ["none", "none"]


def test_labels_are_saved_as_regress_reads_them(opened: Chromium, tmp_path: Path) -> None:
    changed = {flip.id: flip for flip in flips(40)}
    want = []
    for place in range(20):
        press(opened, "j")
        (name,) = ids(opened)
        if name is None:
            continue
        agrees = place % 3 != 0
        press(opened, "1" if agrees else "2", *("4" if place % 2 else ""))
        good_before = changed[name].worse
        want.append({"id": name, "ok": good_before == agrees, "run": "baseline", "suite": "holisafe"})
        if place % 2:  # disagrees with the candidate's score, which is the opposite of the baseline's
            want.append({"id": name, "ok": good_before, "run": "candidate", "suite": "holisafe"})
    assert opened.evaluate("document.getElementById('labels-count').textContent") == f"{len(want)} labels"
    saved = opened.download("document.getElementById('labels-save').click()", tmp_path, "labels.jsonl")
    assert saved.endswith(b"}\n") and saved.isascii()
    assert [json.loads(line) for line in saved.splitlines()] == want
    assert all(url.startswith(("file:", "blob:", "data:")) for url in opened.requests)
    assert opened.complaints == []


def test_saved_labels_correct_the_same_runs(browser: Chromium, tmp_path: Path) -> None:
    base = changed(pair_rows(60, 60), lambda row: row.id == "SSU-0", id='a "half" \ud83d')
    after = changed(
        base, lambda row: row.type == "SSU" and row.query in {f"question {n}" for n in range(8)}, answer=HELP
    )
    after = changed(after, lambda row: row.id == "SSS-3", answer="I'm sorry, I can't \ud83d")
    runs = [stored(tmp_path / name, rows, record_of(rows, name=name)) for name, rows in (("a", base), ("b", after))]
    made = Comparison(baseline=runs[:1], candidate=runs[1:])
    findings = compare(made)
    browser.show(write_report(findings, tmp_path / "report"), width=1280, height=1000)
    for _ in range(len(findings.flips)):
        press(browser, "j", "1", "3")
    browser.download("document.getElementById('labels-save').click()", tmp_path, "labels.jsonl")
    found = [label for _, label in read_labels(tmp_path / "labels.jsonl")]
    assert {(label.id, label.run) for label in found} == {
        (flip.id, run) for flip in findings.flips for run in ("baseline", "candidate")
    }
    assert any(str(label.id).endswith("\ud83d") for label in found)
    said = {(str(label.id), label.run): label.ok for label in found}
    assert all(said[flip.id, "baseline"] == flip.worse != said[flip.id, "candidate"] for flip in findings.flips)
    again = compare(replace(made, labels=tmp_path / "labels.jsonl"))
    assert again.judges[0].corrected is not None and again.judges[0].corrected["labelled"] == 18
    assert browser.complaints == []


def test_a_label_is_taken_back_by_its_own_button_and_turned_by_the_other(opened: Chromium) -> None:
    pressed = f"[...{OPEN}[0].querySelectorAll('.label button')].map(e => e.getAttribute('aria-pressed') === 'true')"
    press(opened, "j", "1")
    assert opened.evaluate(pressed) == [True, False, False, False]
    press(opened, "2")
    assert opened.evaluate(pressed) == [False, True, False, False]
    assert "1 labelled" in opened.evaluate(f"{OPEN}[0].querySelector('summary').textContent")
    press(opened, "2")
    assert opened.evaluate(pressed) == [False] * 4
    assert opened.evaluate("document.getElementById('labels-save').disabled")


def test_labels_stay_with_their_own_report(opened: Chromium, report: Path, tmp_path: Path) -> None:
    count = "document.getElementById('labels-count').textContent"
    press(opened, "j", "1", "3")
    opened.show(report, width=1280, height=1000)
    assert opened.evaluate(count) == "2 labels"
    pressed = f"[...{OPEN}[0].querySelectorAll('.label button')].map(e => e.getAttribute('aria-pressed') === 'true')"
    press(opened, "j")
    assert opened.evaluate(pressed) == [True, False, True, False]
    other = [replace(flip, after="Another answer.") for flip in flips(40, ("string", "gpt-4o"))]
    opened.show(report_of(tmp_path, other), width=1280, height=1000)
    assert opened.evaluate(count) == "0 labels"
    stored = opened.evaluate("JSON.stringify(Object.values(localStorage))")
    assert "Another" not in stored and len(stored) < 200  # ids and yes or no, none of the answers


def test_what_another_page_left_in_storage_does_no_harm(opened: Chromium, report: Path) -> None:
    place = "`safevlm-labels-${document.getElementById('samples').dataset.report}`"
    for left in ("no JSON", "null", "[1]", '{"a": true, "[null,\\"1\\",\\"baseline\\"]": 3}'):
        opened.evaluate(f"localStorage.setItem({place}, {json.dumps(left)})")
        opened.show(report, width=1280, height=1000)
        assert opened.evaluate("document.getElementById('labels-count').textContent") == "0 labels"
        press(opened, "j", "1")
        assert opened.evaluate("document.getElementById('labels-count').textContent") == "1 label"
        assert opened.complaints == []


def test_hostile_answers_are_only_text_even_when_marked(browser: Chromium, tmp_path: Path) -> None:
    nasty = [*HOSTILE, "</script><script>document.title='owned'</script>", "</p></div><b id=owned>", "\ud83d", "\x00"]
    first = next(flip for flip in flips(40) if flip.kind == "pair")
    own = [
        replace(first, id=f'{text}"{n}', before=text, after=nasty[n - 1], query=text, why_before=text, why_after=text)
        for n, text in enumerate(nasty)
    ]
    browser.show(report_of(tmp_path, own), width=1280, height=1000)
    press(browser, *"j" * len(own))
    assert browser.evaluate("[document.title.slice(0, 10), document.getElementById('owned')]") == ["REGRESSION", None]
    assert browser.evaluate("document.querySelectorAll('script, img, iframe').length") == 1
    assert browser.complaints == []


@pytest.mark.parametrize("judges", [1, 2, 6])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_on_paper_the_measures_stand_on_one_page(browser: Chromium, tmp_path: Path, judges: int, dark: bool) -> None:
    findings = sample_findings(judges=2)
    twice = [
        replace(line, key=f"{line.key}/{n}", judge=f"judge {n}")
        for n in range(2, judges)
        for line in findings.lines
        if line.judge == "string" and line.margin is not None
    ]
    own = findings if judges > 1 else sample_findings()
    page = write_report(replace(own, lines=(*own.lines, *twice)), tmp_path / "report")
    browser.show(page, width=1280, height=1000, dark=dark)
    pdf = browser.pdf()
    places = {name.decode(): sheet for name, sheet in re.findall(rb"/([a-z0-9-]+) \[(\d+) 0 R /XYZ", pdf)}
    lines = [sheet for name, sheet in places.items() if name.startswith("line-")]
    assert len(lines) == {1: 9, 2: 15, 6: 39}[judges] and len(set(lines)) == 1
    assert places["measures"] == lines[0]
    assert len(re.findall(rb"/Type /Page\b", pdf)) <= 9
