from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.run import run_suite
from benchmarks.runs.answering.server import ServerAnswerer
from benchmarks.runs.record import read_run
from benchmarks.suites.select import open_suite
from runtimes.language.writing import Decoding
from safevlm.errors import InputError
from tests.benchmarks.judges.server import KEY, Asked, Sent, completion, judging

SUITE = open_suite("holisafe-mini", limit=40)


def answerer(url: str, **changes: object) -> ServerAnswerer:
    settings = {"max_new_tokens": 16, "concurrency": 3, "timeout": 600.0, "tries": 2, "base": 0.01} | changes
    return ServerAnswerer(url, "some-model", **settings)  # type: ignore[arg-type]


def test_the_server_sees_the_very_picture_and_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    by_question: dict[str, list[Image.Image]] = {}
    for row in SUITE.rows:
        by_question.setdefault(row.query or "", []).append(SUITE.picture(row))

    def reply(asked: Asked) -> Sent:
        assert asked.key is not None and KEY in asked.key
        assert (asked.body["temperature"], asked.body["max_tokens"], asked.body["model"]) == (0, 16, "some-model")
        url = asked.body["messages"][0]["content"][0]["image_url"]["url"]
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))
        assert any(np.array_equal(shown, np.asarray(picture)) for picture in by_question[asked.user])
        return completion(f"You asked {asked.user}", "length")

    with judging(reply) as server, answerer(server.url) as asking:
        record = run_suite(asking, SUITE, tmp_path / "run")
        assert len(server.asked) == len(SUITE.rows)
    rows = read_run(tmp_path / "run").rows
    assert all(row.answer == f"You asked {row.query}" and row.probs is None for row in rows)
    assert record.artifact.kind == "server" and record.artifact.sha256 is None
    assert KEY not in (tmp_path / "run" / "run.json").read_text() + (tmp_path / "run" / "samples.jsonl").read_text()


def test_a_filtered_reply_is_a_block_and_a_refused_request_an_error(tmp_path: Path) -> None:
    def reply(asked: Asked) -> Sent:
        if asked.number == 0:
            return completion(None, "content_filter")
        return Sent(status=400, body=b'{"error": {"message": "no"}}') if asked.number == 1 else completion("Yes.")

    with judging(reply) as server, answerer(server.url, concurrency=1) as asking:
        run_suite(asking, SUITE, tmp_path / "run")
    rows = read_run(tmp_path / "run").rows
    assert [row.blocked for row in rows if row.blocked] == ["guard"]
    assert [row.error for row in rows if row.error] == ["request refused: HTTP 400, no"]
    assert sum(row.answer == "Yes." for row in rows) == len(rows) - 2


def test_a_server_that_is_down_stops_the_run(tmp_path: Path) -> None:
    with judging(lambda _: completion("Yes.")) as server:
        url = server.url
    with answerer(url, concurrency=1, tries=1) as asking, pytest.raises(InputError, match=r"not reachable.*--resume"):
        run_suite(asking, SUITE, tmp_path / "run")
    assert read_run(tmp_path / "run").rows == ()
    with judging(lambda _: completion("Yes.")) as server, answerer(server.url, concurrency=1) as asking:
        run_suite(asking, SUITE, tmp_path / "run", resume=True)
    assert len(read_run(tmp_path / "run").rows) == len(SUITE.rows)


def test_sampled_answers_have_a_seed_a_row_and_the_record_says_so(tmp_path: Path) -> None:
    seeds: dict[int, list[int]] = {}
    for seed in (1, 2):
        with judging(lambda _: completion("Yes.")) as server:
            decoding = Decoding(temperature=0.7, seed=seed)
            with answerer(server.url, decoding=decoding) as asking:
                record = run_suite(asking, SUITE, tmp_path / str(seed))
            assert {asked.body["temperature"] for asked in server.asked} == {0.7}
            seeds[seed] = sorted(asked.body["seed"] for asked in server.asked)
        assert (record.seed, record.decoding) == (
            seed,
            {"sampling": "temperature", "temperature": 0.7, "seed": seed, "max_new_tokens": 16},
        )
    assert len({*seeds[1], *seeds[2]}) == 2 * len(SUITE.rows)
