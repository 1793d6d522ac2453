"""The page in a real browser: nothing complains, everything shows, and keyboard and filter work."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageStat

from benchmarks.report.write import write_report
from tests.benchmarks.report.chromium import Chromium
from tests.benchmarks.report.sample_findings import sample_findings
from tests.benchmarks.report.sample_parts import flips

CHANGED = 1500
TAB, ENTER, ESCAPE = ("Tab", 9), ("Enter", 13), ("Escape", 27)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    findings = replace(sample_findings(judges=2), flips=flips(CHANGED, ("string", "gpt-4o")))
    return write_report(findings, tmp_path_factory.mktemp("browser") / "report")


@pytest.fixture
def opened(browser: Chromium, report: Path) -> Chromium:
    browser.show(report, width=1280, height=1000)
    return browser


def shown(browser: Chromium, selector: str) -> int:
    """Return how many of these are neither hidden nor in a closed ``details``."""
    found = browser.evaluate(f"[...document.querySelectorAll('{selector}')].filter(e => e.checkVisibility()).length")
    assert isinstance(found, int)
    return found


def filtered(browser: Chromium) -> int:
    """Return how many samples the filter leaves."""
    found = browser.evaluate(
        "[...document.querySelectorAll('.flip:not([hidden])')].filter(e => !e.closest('.samples').hidden).length"
    )
    assert isinstance(found, int)
    return found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(360, 800), (800, 1000), (1280, 1000)])
def test_each_window_and_scheme_shows_the_page_without_complaint(
    browser: Chromium, report: Path, width: int, height: int, dark: bool
) -> None:
    browser.show(report, width=width, height=height, dark=dark)
    assert browser.complaints == []
    assert browser.requests == [report.resolve().as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    beyond = "[...document.querySelectorAll('main *')].filter(e => e.checkVisibility() && !e.closest('.scroll')"
    assert (
        browser.evaluate(f"{beyond} && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML)") == []
    )
    cut = "[...document.querySelectorAll('.measures .badge, .measures .reason')]"
    assert browser.evaluate(f"{cut}.every(e => e.getBoundingClientRect().right <= innerWidth)")
    text = browser.evaluate("document.body.innerText")
    for told in ("REGRESSION", "20.17 %", "+4.79 points", "+4.18 to +5.40", "294 worse", "SafeLLaVA-7B-gptq-w4g128"):
        assert told in text
    browser.evaluate("document.querySelector('#samples').scrollIntoView({behavior: 'instant'})")
    picture = Image.open(io.BytesIO(browser.screenshot()))
    assert picture.size == (width, height)
    brightness = ImageStat.Stat(picture.convert("L")).mean[0]
    assert brightness < 70 if dark else brightness > 200


def test_texts_are_hidden_until_they_are_clicked(opened: Chromium) -> None:
    assert shown(opened, ".texts") == 0
    opened.evaluate("document.querySelector('.samples > summary').click()")
    assert shown(opened, ".flip") > 100 and shown(opened, ".texts") == 0
    opened.evaluate("document.querySelector('.flip > summary').click()")
    assert shown(opened, ".texts") == 1
    assert opened.complaints == []


def test_hostile_text_did_nothing(opened: Chromium) -> None:
    assert opened.evaluate("document.title") == "REGRESSION: SafeLLaVA-7B → SafeLLaVA-7B-gptq-w4g128"
    assert opened.evaluate("document.querySelectorAll('script').length") == 1


def test_the_keyboard_reaches_skip_link_tables_and_samples(opened: Chromium) -> None:
    opened.press(*TAB[:1], code=TAB[1])
    assert opened.evaluate("document.activeElement.className") == "skip"
    assert opened.evaluate("document.activeElement.getBoundingClientRect().top") >= 0
    opened.press(ENTER[0], code=ENTER[1], text="\r")
    assert opened.evaluate("location.hash") == "#measures"
    opened.evaluate("document.querySelector('.samples > summary').focus()")
    opened.press(ENTER[0], code=ENTER[1], text="\r")
    assert opened.evaluate("document.querySelector('.samples').open")
    opened.press(TAB[0], code=TAB[1])
    assert opened.evaluate("document.activeElement.matches('.flip > summary')")
    outline = opened.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    opened.press(ENTER[0], code=ENTER[1], text="\r")
    assert shown(opened, ".texts") == 1


def test_the_filter_finds_by_type_direction_judge_and_text(opened: Chromium) -> None:
    assert shown(opened, "#filter") == 1 and filtered(opened) == CHANGED
    assert opened.evaluate("document.getElementById('filter-count').textContent") == "1,500 samples"

    def choose(name: str, value: str) -> int:
        opened.evaluate(
            f"(() => {{ const e = document.getElementById('filter-{name}'); e.value = '{value}';"
            "e.dispatchEvent(new Event('change')); })()"
        )
        return filtered(opened)

    found = flips(CHANGED, ("string", "gpt-4o"))
    ssu = {flip.id for flip in found if flip.type == "SSU"}
    hate = {flip.id for flip in found if flip.type == "SSU" and flip.category == "hate"}
    answered = {flip.id for flip in found if flip.id in hate and flip.worse}
    other = {flip.id for flip in found if flip.id in answered and flip.judge == "gpt-4o"}
    assert 0 < len(other) < len(answered) < len(hate) < len(ssu)
    assert choose("kind", "pair") == len({flip.id for flip in found if flip.kind == "pair"})
    assert choose("type", "SSU") == len(ssu)
    assert choose("category", "hate") == len(hate)
    assert choose("way", "answered") == choose("way", "worse") == len(answered)
    assert choose("judge", "gpt-4o") == len(other)
    assert shown(opened, ".flip") == len(other)
    told = opened.evaluate("document.getElementById('filter-count').textContent")
    assert told == f"{len(other)} of 1,500 samples"
    for name in ("kind", "type", "category", "way", "judge"):
        choose(name, "")
    assert choose("suite", "utility-mini") == len({flip.id for flip in found if flip.kind == "question"})
    choose("suite", "")

    opened.evaluate("document.getElementById('filter-text').focus()")
    opened.write("DO WITH it, 1234?")
    opened.evaluate("new Promise(done => setTimeout(done, 400))")
    assert filtered(opened) == 1 and shown(opened, ".flip") == 1
    opened.press(ESCAPE[0], code=ESCAPE[1])
    assert filtered(opened) == CHANGED
    assert opened.complaints == []


def test_without_script_everything_but_the_filter_is_there(browser: Chromium, report: Path) -> None:
    browser.show(report, width=1280, height=1000, scripts=False)
    assert shown(browser, "#filter") == 0
    assert shown(browser, ".samples > summary") == 7
    browser.evaluate("document.querySelector('.samples > summary').focus()")
    browser.press(ENTER[0], code=ENTER[1], text="\r")
    assert shown(browser, ".flip") > 100


def test_the_page_is_ready_at_once(opened: Chromium) -> None:
    timing = "performance.getEntriesByType('navigation')[0]"
    assert opened.evaluate(f"{timing}.loadEventEnd - {timing}.responseEnd") < 5000  # ms, on a machine that is busy
    begun = "const begun = performance.now(); const e = document.getElementById('filter-way'); e.value = 'better';"
    spent = opened.evaluate(
        f"(() => {{ {begun} e.dispatchEvent(new Event('change')); return performance.now() - begun }})()"
    )
    assert spent < 500
