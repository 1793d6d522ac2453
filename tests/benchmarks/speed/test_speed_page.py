"""``benchmarks.speed page``: every figure of every record is there, in plain HTML that loads and runs nothing."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report.text import visible
from benchmarks.speed.__main__ import main
from benchmarks.speed.page import KINDS, ROOM, Bar, bar_plot, read_records, shortened, write_speed_page
from safevlm.errors import InputError
from safevlm.terminal.commandline import run
from tests.benchmarks.report.chromium import BINARY, Chromium
from tests.benchmarks.report.sample_parts import HOSTILE
from tests.benchmarks.report.test_page import Read
from tests.benchmarks.speed import speed_samples as samples


@pytest.fixture(scope="module")
def records() -> dict[str, dict[str, Any]]:
    return samples.all_records()


@pytest.fixture(scope="module")
def page(records: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    return write_speed_page(samples.write(folder, records), folder / "deep" / "page")


@pytest.fixture(scope="module")
def made(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def section(made: str, kind: str) -> str:
    """Return the markup of the section of this kind."""
    (found,) = (part for part in re.findall(r'<section id="record-.*?</section>', made, re.S) if f">{kind}: <" in part)
    return str(found)


def cells(made: str, kind: str) -> list[list[str]]:
    """Return the texts of the body's rows of all tables of a section."""
    rows = re.findall(r"<tr><th scope=\"row\">.*?</tr>", section(made, kind))
    return [re.findall(r"<bdi>(.*?)</bdi>", row) for row in rows]


# -- what is there --------------------------------------------------------------------------------------


def test_the_command_writes_page_and_records(
    records: dict[str, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = samples.write(tmp_path, records)
    out = tmp_path / "page"
    for _ in range(2):  # a folder that is there keeps what else is in it
        with pytest.raises(SystemExit) as ended:
            run(main, ["page", *map(str, paths), "--out", str(out)])
        assert ended.value.code == 0
        assert capsys.readouterr().out == f"page: {out / 'speed.html'}\n"
        (out / "mine").write_text("kept", encoding="utf-8")
    assert {path.name for path in out.iterdir()} == {"speed.html", "speed.json", "mine"}
    listed = json.loads((out / "speed.json").read_text(encoding="utf-8"))
    assert listed["records"] == list(records.values()) and listed["schema_version"] == 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", listed["created"])
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_every_record_says_machine_command_versions_and_how(made: str, records: dict[str, dict[str, Any]]) -> None:
    for kind, record in records.items():
        text = Read(section(made, kind.capitalize().replace("_", " "))).text
        machine = record["machine"]
        assert (machine if isinstance(machine, str) else machine["name"]) in text
        for name, version in record["versions"].items():
            assert f"{name}{version or 'not installed'}" in text, name
        for told in record.get("how_measured", {}).values():
            assert told in text
        commands = [row["command"] for row in record["rows"]] if kind == "true_shapes" else [record["command"]]
        assert all(command in text for command in commands)


def test_every_figure_and_text_of_every_row_is_in_a_table(made: str, records: dict[str, dict[str, Any]]) -> None:
    """What stands in a row's cell is the row's own value: as it is, or rounded to what people read."""
    for kind, record in records.items():
        text = Read(section(made, kind.capitalize().replace("_", " "))).text
        cases = record.get("cases", [record])
        for row in (row for case in cases for row in case.get("rows", [])):
            told = [each for each in row.values() if isinstance(each, str)]
            assert all(each in re.sub(r"\s+", " ", text) for each in map(str.strip, told)), kind
    rows = cells(made, "Guard")
    assert len(rows) == len(records["guard"]["rows"])
    assert rows[2] == [
        "ONNX Runtime", "onnxruntime", "fp32", "cpu", "1", "guard", "yes", "random", "measured", "24.25", "36.00",
        "6.00", "24.25", "24.25, 24.00, 30.00", "30", "2.52", "1.25e−07", "1,600.00", "1,591.50", "–", "–",
    ]  # fmt: skip
    assert cells(made, "Gate")[2] == ["published", "answer", "1,432.00", "2.50", "619.50", "1", "0", "0", "7", "9"]
    assert cells(made, "Gate")[4][4] == "−1.25" and cells(made, "Gate")[1][4] == "–"
    assert ["Overhead, ms", "3.75, 7.25"] in cells(made, "Gateway")
    assert cells(made, "Quantize")[1][1:] == ["gptqmodel", "7.6.0", "85.00", "1,800.00", "0.13"]


def test_measures_are_drawn_and_told_in_words(made: str) -> None:
    text = Read(section(made, "Guard")).text
    assert "torch eager · fp32: 61.00 ms; ONNX Runtime · fp32: 24.25 ms; " in text
    titles = re.findall(r"<h4[^>]*>(.*?)</h4>", section(made, "Guard"))
    assert titles[:4] == [
        "Latency median: device cpu, batch 1", "Latency median: device cpu, batch 8",
        "Latency median: device gpu, batch 1", "Peak memory: device cpu, batch 1",
    ]  # fmt: skip
    assert "gate · block: 31.50 ms" in made and "Direct: 1.50, 2.25 ms" in made
    assert "gptqmodel: 85.00 s" in made and "gptqmodel: 1,800.00 MiB" in made
    assert re.search(r"write: \d+\.\d+ MiB; guard: \d+\.\d+ MiB", Read(section(made, "True shapes")).text)


def test_what_was_not_measured_says_why(made: str) -> None:
    reasons = re.findall(r"<li><bdi>(.*?)</bdi></li>", section(made, "Guard"))
    assert reasons == [
        "ncnn · fp32: failed: the process was ended by SIGKILL",
        "TensorRT · fp32: unavailable: no GPU",
        "torch eager · fp32: measured: round 3: out of memory",
    ]
    assert "llm-compressor: it broke" in section(made, "Quantize")
    assert "guard: took " in section(made, "True shapes")


def test_random_weights_are_marked_and_a_checkpoint_is_not(made: str, tmp_path: Path) -> None:
    assert '<p class="warning"><strong>Not a real model:</strong> random weights' in section(made, "Guard")
    paths = samples.write(tmp_path, {"real": samples.guard(random=False)})
    assert "Not a real model" not in write_speed_page(paths, tmp_path / "out").read_text(encoding="utf-8")


def test_a_record_without_rows_is_shown(tmp_path: Path) -> None:
    bare = {**samples.guard(), "rows": []}
    made = write_speed_page(samples.write(tmp_path, {"bare": bare}), tmp_path / "out").read_text(encoding="utf-8")
    assert "Nothing was measured." in made and Read(made).all("svg") == []


# -- the page as such -----------------------------------------------------------------------------------


def test_nothing_is_loaded_and_nothing_runs(made: str) -> None:
    read = Read(made)
    policy = next(tag["content"] for tag in read.all("meta") if tag.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    assert read.all("script") == []
    for tag, attributes in read.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "action", "data", "xlink:href", "poster", "background"):
                assert value is not None and value.startswith(("#", "data:")), (tag, name, value)
    assert not re.search(r"https?://", re.sub(r'xmlns[:a-z]*="[^"]*"', "", made))
    assert "url(" not in re.sub(r"url\(#", "", made) and "@import" not in made


def test_tables_figures_and_headings_are_accessible(made: str) -> None:
    read = Read(made)
    assert len(read.all("h1")) == 1 and read.all("html")[0]["lang"] == "en"
    assert made.count("<caption>") == len(read.all("table")) == 5
    assert all(tag.get("scope") in ("col", "row") for tag in read.all("th"))
    drawings = read.all("svg")
    assert drawings and all(tag["role"] == "img" and tag["aria-labelledby"] for tag in drawings)
    assert len(re.findall(r"<svg [^>]*><title>[^<]+</title>", made)) == len(drawings)
    ids = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    named = [tag[name] or "" for tag in drawings for name in ("aria-labelledby", "aria-describedby")]
    assert {*named, *((tag["href"] or "").removeprefix("#") for tag in read.all("a"))} <= set(ids)
    levels = [int(tag[1]) for tag, _ in read.tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(deeper - level <= 1 for level, deeper in itertools.pairwise(levels))


def test_figures_take_their_colours_from_the_page(made: str) -> None:
    for figure in re.findall(r"<figure.*?</figure>", made, re.S):
        assert not re.search(r"(fill|stroke): *#", figure)


def spoilt(value: Any, hostile: str, *, key: str = "") -> Any:
    """Return the record with every text that it may choose replaced, and each name of a mapping that it may."""
    if isinstance(value, dict):
        free = key in ("versions", "how_measured", "first_token", "passes")
        return {hostile if free else name: spoilt(each, hostile, key=name) for name, each in value.items()}
    if isinstance(value, list):
        return [spoilt(each, hostile) for each in value]
    return hostile if isinstance(value, str) and key not in ("benchmark", "status") else value


@pytest.mark.parametrize("hostile", [text.replace("\ud800", "") for text in HOSTILE])  # it is not read from JSON
def test_hostile_text_everywhere_is_only_text(hostile: str, records: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    own = {kind: spoilt(copy.deepcopy(record), hostile) for kind, record in records.items()}
    own["guard"]["rows"][0]["versions"] = {hostile: hostile}
    made = write_speed_page(samples.write(tmp_path, own), tmp_path / "out").read_text(encoding="utf-8")
    read = Read(made)
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", made)
    assert read.all("script") == [] and read.all("img") == [] and len(read.all("main")) == 1
    assert not any(name.startswith("on") for _, attributes in read.tags for name in attributes)
    assert visible(hostile) in read.text


def test_names_on_figures_are_cut_and_never_mathematics() -> None:
    assert shortened("one\n two", 20) == "one two"
    assert shortened("x" * 60, 10) == "x" * 9 + "…"
    assert shortened("日本語の答え", 7) == "日本語…", "a wide letter takes two"
    assert shortened("x" * 10, 10) == "x" * 10
    long = Bar(name="$x_1$ & <b>" + "y" * 80, value=0.0, told="0 ms")
    drawn = bar_plot("p", "Time", "", [long], unit="ms")
    assert "$x_1$ &amp; &lt;b&gt;yy" in drawn.svg and "y…<" in drawn.svg
    (name,) = re.findall(r">(\$x_1.*?)<", drawn.svg)
    assert len(name.replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")) == ROOM - len("0 ms") - 2


def test_the_same_bars_give_the_same_bytes() -> None:
    bars = [Bar(name="a", value=2.0, told="2 ms", bad=True), Bar(name="b", value=1, told="1 ms")]
    assert bar_plot("p", "Time", "", bars, unit="ms") == bar_plot("p", "Time", "", bars, unit="ms")


# -- bad input ------------------------------------------------------------------------------------------


def changed(*path: Any, to: Any) -> dict[str, Any]:
    """Return a guard's record with one value replaced."""
    record = samples.guard()
    place: Any = record
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return record


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"not valid JSON \("),
        ("\xff", "not valid JSON"),
        ("[1]", "a record must be a JSON object, not list"),
        ("{}", f"'benchmark' is missing; it must be one of {', '.join(KINDS)}"),
        ('{"benchmark": "dance"}', "'benchmark' is \"dance\"; it must be one of guard"),
        ('{"benchmark": ["guard"]}', r"'benchmark' is \[\"guard\"\]"),
        ('{"benchmark": "gate"}', r"not a complete record of gate: created: Field required"),
        (changed("created", to=7), r"created: .*string"),
        (changed("schema_version", to=2), r"schema_version must be 1, not 2"),
        (changed("subject", "seed", to=float("nan")), r"record\.subject\.seed \(nan\) is not a number"),
        (changed("rows", 0, "latency", "p95_ms", to=float("inf")), r"record\.rows\[0\]\.latency\.p95_ms \(inf\)"),
    ],
)  # fmt: skip
def test_what_is_no_record_is_refused_with_its_file(content: Any, message: str, tmp_path: Path) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    path = tmp_path / "strange.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=rf"(?s)strange\.json: .*{message}.*Give a file that benchmarks\.speed wrote"):
        write_speed_page([*samples.write(tmp_path, {"fine": samples.gateway()}), path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_later_version_adds_is_kept(tmp_path: Path) -> None:
    record = {**samples.gateway(), "more": {"of": "it"}}
    (path,) = samples.write(tmp_path, {"new": record})
    assert read_records([path])[0][1] == record
    page = write_speed_page([path], tmp_path / "out")
    assert json.loads((page.parent / "speed.json").read_text(encoding="utf-8"))["records"] == [record]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("missing.json --out out", r"missing\.json: there is no such file"),
        (". --out out", r"cannot be read \(a folder, not a regular file\)"),
        ("gateway.json --out gateway.json", r"--out gateway\.json is a file\. Give a folder"),
        ("gateway.json --out gateway.json/out", r"gateway\.json cannot be written: a file of that name exists"),
        ("gateway.json", "Missing option '--out'"),
        ("--out out", "Missing argument 'RECORDS"),
    ],
)
def test_bad_paths(
    arguments: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    samples.write(Path(), {"gateway": samples.gateway()})
    with pytest.raises(SystemExit) as ended:
        run(main, ["page", *arguments.split()])
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["gateway.json"]


@pytest.mark.parametrize("strange", ["fast", -1.0, 1e300, True, None, [], ["a", 1], {"deep": [{"er": []}]}, 10**40])
def test_any_json_in_place_of_a_figure_is_shown_or_left_out(strange: Any, tmp_path: Path) -> None:
    """A record is shown as it stands: no value of a row ends in a traceback."""
    record = {**samples.gate(), "more": strange}
    record["rows"] = [{**record["rows"][0], "median_ms": strange}, {**record["rows"][1], "device": strange}]
    record["settings"]["threads"] = strange
    page = write_speed_page(samples.write(tmp_path, {"strange": record}), tmp_path / "out")
    assert "Gate: <" in page.read_text(encoding="utf-8")


# -- in a browser ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    if BINARY is None:
        pytest.skip("no chromium, chromium-browser or google-chrome is installed")
    with Chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize("width", [360, 800, 1280])
def test_each_window_shows_the_page_without_complaint(browser: Chromium, page: Path, width: int) -> None:
    browser.show(page, width=width, height=900, dark=width == 800)
    assert browser.complaints == [] and browser.requests == [page.resolve().as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    beyond = "[...document.querySelectorAll('main *')].filter(e => e.checkVisibility() && !e.closest('.scroll')"
    assert (
        browser.evaluate(f"{beyond} && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML)") == []
    )


def test_texts_of_a_figure_do_not_overlap(browser: Chromium, page: Path) -> None:
    browser.show(page, width=360, height=900)
    overlaps = """[...document.querySelectorAll('.plot svg')].flatMap(svg => {
        const boxes = [...svg.querySelectorAll('text')].map(e => [e.textContent, e.getBoundingClientRect()]);
        return boxes.flatMap(([one, a], at) => boxes.slice(at + 1)
            .filter(([_, b]) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
                && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3)
            .map(([other]) => one + ' | ' + other));
    })"""
    assert browser.evaluate("document.querySelectorAll('.plot svg text').length") > 100
    assert browser.evaluate(overlaps) == []
