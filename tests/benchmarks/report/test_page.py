"""The page says everything, loads nothing, and takes no text of strangers for markup."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.comparison.findings import Findings, Verdict
from benchmarks.report.flipped import MOST, PICTURE_BUDGET, changed_samples, choices, group_samples
from benchmarks.report.page import page
from benchmarks.report.text import sentence_of
from safevlm.errors import InputError
from tests.benchmarks.report.sample_findings import sample_findings
from tests.benchmarks.report.sample_parts import HOSTILE, flips

VOID = {"meta", "link", "input", "img", "br"}


class Read(HTMLParser):
    """Tags with their attributes, all text that is shown, and whether tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._shown: list[str] = []
        self.script = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.script += data
        elif not self._open or self._open[-1] != "style":
            self._shown.append(data)

    @property
    def text(self) -> str:
        return "".join(self._shown)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def findings() -> Findings:
    return sample_findings(judges=2)


@pytest.fixture(scope="module")
def read(findings: Findings) -> Read:
    return Read(page(findings))


def test_nothing_is_loaded_from_anywhere(findings: Findings, read: Read) -> None:
    policy = next(tag["content"] for tag in read.all("meta") if tag.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(read.script.encode()).digest()).decode()
    assert policy == (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    for tag, attributes in read.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "srcset", "action", "data", "xlink:href", "poster", "background"):
                assert value is not None and value.startswith(("#", "data:")), (tag, name, value)
            assert not name.startswith("on"), (tag, name)
    style = re.search(r"<style>(.*?)</style>", page(findings), re.DOTALL)
    assert style is not None and "url(" not in style[1] and "@import" not in style[1]
    assert len(read.all("script")) == 1


def test_ids_are_unique_and_references_have_one(read: Read) -> None:
    ids = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    named = [
        reference
        for _, attributes in read.tags
        for name in ("aria-labelledby", "aria-describedby")
        for reference in (attributes.get(name) or "").split()
    ]
    links = [(tag.get("href") or "").removeprefix("#") for tag in read.all("a")]
    assert named and links and set(named + links) <= set(ids)


def test_one_heading_landmarks_language_and_scopes(read: Read) -> None:
    assert len(read.all("h1")) == 1 and read.all("html")[0]["lang"] == "en"
    assert [len(read.all(tag)) for tag in ("header", "main", "footer", "nav")] == [1, 1, 1, 1]
    assert all(tag.get("scope") for tag in read.all("th"))
    pictures = [tag for tag in read.all("svg") if tag.get("aria-hidden") != "true"]
    assert pictures and all(
        tag["role"] == "img" and (tag.get("aria-label") or tag.get("aria-labelledby")) for tag in pictures
    )
    levels = [int(tag[1]) for tag, _ in read.tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(deeper - level <= 1 for level, deeper in itertools.pairwise(levels))


@pytest.mark.parametrize("verdict", ["PASS", "REGRESSION", "INCONCLUSIVE", "ANOMALOUS"])
def test_verdict_reasons_and_every_figure_are_there(verdict: Verdict) -> None:
    findings = sample_findings(verdict, judges=2)
    read = Read(page(findings))
    text = " ".join(read.text.split())
    assert text.index(verdict) < text.index("The measures that decide")
    for reason in findings.reasons:
        assert reason in text
    for line in findings.lines:
        for value in (line.before, line.after):
            assert (f"{100 * value:.2f} %" if line.unit == "share" else f"{value:.4f}") in text, line.key
        change = f"{100 * line.change:+.2f}" if line.unit == "share" else f"{line.change:+.4f}"
        assert change.replace("-", "−").replace("+0.00", "0.00") in text, line.key
        assert line.reason in text
        assert line.worse is None or f"{line.worse:,} worse {line.better:,} better" in text, line.key
    assert "string, gpt-4o" in text[: text.index("Line by line")]
    level = "PASS by one-sided 95 % bounds, REGRESSION from p < 0.05 after Holm’s correction, seed 0"
    assert level in text[: text.index("Line by line")]
    for line in findings.lines:
        assert line.margin is None or " ".join(sentence_of(line).split()) in text, line.key
    for told in (*findings.cautions, "a8" * 32, "0.812", "93.12 %", "whose doing", "Cohen’s κ"):
        assert told.lower() in text.lower(), told
    assert text.count("cannot be compared until") == (verdict == "ANOMALOUS")


def test_corrected_rates_stand_in_a_table(findings: Findings, read: Read) -> None:
    rows = re.findall(r'<tr><th scope="row">(ASR before|ASR after)</th>(.*?)</tr>', page(findings))
    cells = {name: re.findall(r">([^<]+)</td>", row) for name, row in rows}
    assert cells == {
        "ASR before": ["0.1710", "0.1490 to 0.1940", "0.9400", "0.9810"],
        "ASR after": ["0.2140", "0.1490 to 0.1940", "0.9400", "0.9810"],
    }
    assert "RR: not corrected, because the labels cannot tell; labelled: 400." in read.text


def test_figures_are_told_in_words_too(read: Read) -> None:
    text = read.text
    assert "mASR: before 15.38 %, after 20.17 %, change +4.79 points" in text
    assert "mASR: 294 worse, 134 better" in text
    assert "caught at 1, 5 and 10 % of safe images blocked" in text
    assert "stated 95 %, true 95 % (93 to 96 %) of 861" in text


def test_both_runs_stay_visible_in_the_reliability_plot_where_they_are_equal() -> None:
    findings = sample_findings()
    made = page(replace(findings, guard_after=findings.guard_before))
    drawing = re.search(r'<svg[^>]*aria-labelledby="reliability-title".*?</svg>', made, re.DOTALL)
    assert drawing is not None and findings.guard_before is not None
    dots: dict[str, set[str]] = {}
    for mark, x, style in re.findall(
        r'<use href="#(reliability-m[0-9a-f]+)" x="([0-9.]+)"[^>]*style="([^"]*)"', drawing[0]
    ):
        dots.setdefault(f"{mark} {'after' if 'var(--after)' in style else 'before'}", set()).add(x)
    before, after = (
        [xs for name, xs in dots.items() if name.endswith(side) and len(xs) >= len(findings.guard_before.bins)]
        for side in ("before", "after")
    )
    assert before and after and not set.union(*before) & set.union(*after)  # side by side, never one over the other
    told = " ".join(Read(made).text.split())
    assert "stated 5 %, true 5 % (4 to 7 %) of 700" in told


def test_figures_take_their_colours_from_the_page() -> None:
    drawn = re.findall(r"<figure.*?</figure>", page(sample_findings()), re.DOTALL)
    assert len(drawn) == 4
    css = resources.files("benchmarks.report").joinpath("templates/style.css").read_text(encoding="utf-8")
    for figure in drawn:
        assert not re.search(r"(fill|stroke): *#", figure)
        for variable in set(re.findall(r"var\(--([a-z]+)\)", figure)):
            assert f"--{variable}:" in css


def test_a_setting_that_must_agree_and_does_not_is_marked() -> None:
    broken = re.findall(r'<tr class="differs broken"><th scope="row">([a-z_.]+)', page(sample_findings("ANOMALOUS")))
    assert broken == ["prompt"]
    assert 'class="differs broken"' not in page(sample_findings("PASS"))
    differing = re.findall(r'<tr class="differs"><th scope="row">([a-z0-9_.]+)', page(sample_findings("PASS")))
    assert differing[:3] == ["name", "kind", "sha256"] and "created" not in differing


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_everywhere_is_only_text(hostile: str) -> None:
    base = sample_findings(judges=2)
    spoilt = replace(
        base,
        reasons=(hostile,),
        cautions=(hostile,),
        created=hostile,
        lines=tuple(replace(line, title=hostile, reason=hostile, method=hostile, judge=hostile) for line in base.lines),
        flips=tuple(
            replace(flip, id=f"{hostile}{n}", judge=hostile, category=hostile, image=hostile, query=hostile)
            for n, flip in enumerate(base.flips)
        ),
        judges=tuple(replace(judge, name=hostile, identity={hostile: hostile}) for judge in base.judges),
        steps=tuple(replace(step, title=hostile, before=hostile, after=hostile) for step in base.steps),
        baseline=({"artifact": {"name": hostile, hostile: [hostile]}, "suite": {"name": hostile}, hostile: hostile},),
        versions={hostile: hostile},
        margins={hostile: hostile},
    )
    made = page(spoilt)
    read = Read(made)
    made.encode("utf-8")
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", made)
    assert len(read.all("script")) == 1 and read.all("img") == [] and len(read.all("main")) == 1
    assert not any(name.startswith("on") for _, attributes in read.tags for name in attributes)
    for tag in read.tags:
        assert tag[1].get("src") is None


def test_a_sample_that_two_judges_saw_change_is_shown_once() -> None:
    found = flips(80, ("string", "gpt-4o"))
    assert len(found) > 80
    samples = changed_samples(found)
    assert len(samples) == 80
    assert {each.judges for each in samples if each.first.kind == "pair"} == {("string",), ("string", "gpt-4o")}
    worse = [each.first.worse for each in samples]
    assert worse == sorted(worse, reverse=True)


def test_samples_of_two_suites_with_one_id_are_two() -> None:
    one = flips(1)[0]
    assert len(changed_samples([replace(one, suite=name) for name in ("holisafe", "other", None)])) == 3


def test_each_judge_says_why_of_both_answers() -> None:
    found = [flip for flip in flips(40, ("string", "gpt-4o")) if flip.kind == "pair"]
    own = [replace(flip, why_before=f"<b>{flip.judge}", why_after=None) for flip in found]
    made = page(replace(sample_findings(), flips=tuple(own)))
    assert made.count("&lt;b&gt;string") == sum(flip.judge == "string" for flip in found)
    assert made.count("&lt;b&gt;gpt-4o") == sum(flip.judge == "gpt-4o" for flip in found) > 0


def test_only_answers_to_pairs_can_be_labelled_and_only_by_an_id() -> None:
    first = next(flip for flip in flips(40) if flip.kind == "pair")
    ids = ["17", 'a"b\n\u202e\x00', "", "half \ud800"]
    own = [replace(first, id=each) for each in ids] + [flip for flip in flips(40) if flip.kind != "pair"]
    groups, _ = group_samples(changed_samples(own), {})
    named = {one.name for group in groups for one in (*group.worse, *group.better)} - {""}
    assert {json.loads(name) for name in named} == {*ids} - {""} and all(name.isascii() for name in named)


def test_choices_are_what_occurs_and_what_tells_samples_apart() -> None:
    groups, _ = group_samples(changed_samples(flips(200, ("string", "gpt-4o"))), {})
    found = choices(groups)
    assert [value for value, _ in found["kind"]] == ["pair", "question", "image"]
    assert [value for value, _ in found["type"]] == ["SSU", "USU", "UUU", "SUU", "SSS"]
    assert {"worse", "better", "answered", "refused", "right", "wrong"} < {value for value, _ in found["way"]}
    assert set(found) == {"kind", "type", "way", "category", "judge", "suite"}
    one = [flip for flip in flips(200) if flip.type == "SSU" and flip.worse]
    assert set(choices(group_samples(changed_samples(one), {})[0])) == {"way", "category"}


def test_groups_are_in_order_and_lose_nothing() -> None:
    samples = changed_samples(flips(400))
    groups, unshown = group_samples(samples, {})
    assert unshown == 0 and sum(len(group.worse) + len(group.better) for group in groups) == 400
    assert [group.key for group in groups] == [
        "pair/SSU",
        "pair/USU",
        "pair/UUU",
        "pair/SUU",
        "pair/SSS",
        "question",
        "image",
    ]
    said = {(one.sides, one.worse) for group in groups if group.key == "pair/SSS" for one in group.worse + group.better}
    assert said == {(("answered", "refused"), True), (("refused", "answered"), False)}


def test_what_has_no_room_is_counted_and_the_worse_is_kept() -> None:
    many = changed_samples(flips(MOST + 50))
    groups, unshown = group_samples(many, {})
    assert unshown == 50
    kept = sum(len(group.worse) for group in groups)
    assert kept == sum(each.first.worse for each in many)
    text = Read(page(replace(sample_findings(), flips=flips(MOST + 50)))).text
    assert "50 further samples had no room here" in text


def test_long_texts_are_cut_visibly_only_where_all_would_not_fit() -> None:
    def texts(changed: int, length: int) -> Sequence[str]:
        own = [replace(flip, after="x" * length) for flip in flips(changed)]
        groups, _ = group_samples(changed_samples(own), {})
        return [one.after for group in groups for one in (*group.worse, *group.better)]

    assert set(texts(10, 5000)) == {"x" * 5000}
    cut = texts(1500, 5000)
    assert all(text.endswith("x…") for text in cut) and sum(map(len, cut)) < 2_600_000


def test_images_beyond_the_budget_say_that_there_was_no_room() -> None:
    samples = changed_samples(flips(100))
    url = "data:image/jpeg;base64," + "A" * (PICTURE_BUDGET // 50)
    groups, _ = group_samples(samples, {each.first.image or "": (url, "") for each in samples})
    shown = [one for group in groups for one in (*group.worse, *group.better)]
    assert 40 < sum(bool(one.picture) for one in shown) <= 50
    assert all(bool(one.picture) != bool(one.picture_missing) for one in shown)


def test_pictures_are_there_only_when_asked_for(tmp_path: Path) -> None:
    findings = sample_findings()
    names = sorted({flip.image for flip in findings.flips if flip.image})
    for name in names[1:]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (1600, 900), (200, 40, 40)).save(tmp_path / name)
    assert Read(page(findings)).all("img") == []
    shown = Read(page(findings, images=tmp_path))
    sources = [tag["src"] or "" for tag in shown.all("img")]
    assert len(set(sources)) == 1 and len(sources) >= len(names) - 1
    assert sources[0].startswith("data:image/jpeg;base64,") and len(sources[0]) < 20_000
    assert f"The image cannot be shown: {tmp_path / names[0]}" in shown.text  # missing ones say so


def test_pictures_outside_the_folder_are_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for path in (tmp_path / "secret.png", folder / "fine.png"):
        Image.new("RGB", (8, 8)).save(path)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    names = ["../secret.png", str(tmp_path / "secret.png"), "link.png", "nul\0.png", "fine.png"]
    own = tuple(replace(flip, image=name) for flip, name in zip(flips(5), names, strict=True))
    read = Read(page(replace(sample_findings(), flips=own), images=folder))
    assert len(read.all("img")) == 1
    assert read.text.count("its name leads out of the image folder") == 4


def test_a_folder_without_any_of_the_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has none of the \d+ images of changed samples"):
        page(sample_findings(), images=tmp_path)
    with pytest.raises(InputError, match="there is no such folder"):
        page(sample_findings(), images=tmp_path / "none")


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_of_wcag_aa(scheme: str) -> None:
    css = resources.files("benchmarks.report").joinpath("templates/style.css").read_text(encoding="utf-8")
    blocks = [
        dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root {(.*?)}", css, re.S)
    ]
    colours = {**blocks[0], **(blocks[1] if scheme == "dark" else {})}
    for ground in ("page", "surface", "sunken"):
        for ink in ("ink", "muted", "link"):
            assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
    for verdict in ("pass", "regression", "inconclusive", "anomalous"):
        for ground in ("surface", f"{verdict}-tint"):
            assert contrast(colours[verdict], colours[ground]) >= 4.5, (verdict, ground)
    for ink in ("worse", "better"):
        assert contrast(colours[ink], colours["surface"]) >= 4.5
    for mark in ("before", "after"):
        assert contrast(colours[mark], colours["surface"]) >= 3
    assert (
        contrast(colours["surface"], colours["ink"]) >= 4.5
        and contrast(colours["surface"], colours["regression"]) >= 4.5
    )
    for band in re.findall(r"\.band\.[a-z]+ { background: (#[0-9a-f]{6})", css):
        assert contrast("#ffffff", band) >= 4.5
