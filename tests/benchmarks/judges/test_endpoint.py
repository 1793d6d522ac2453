"""A judging model over a real socket, right, slow, limited, broken or down: what gives no verdict stays unscored."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import email.utils
import io
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.judges.cache import AnswerCache
from benchmarks.judges.chat_endpoint import ChatEndpoint, ChatServer, Patience
from benchmarks.judges.endpoint import GIVE_UP, EndpointJudge, Verdict
from benchmarks.judges.images import ShownImages
from benchmarks.runs.record import Row
from safevlm.errors import InputError
from safevlm.terminal.api_key import read_key
from tests.benchmarks.judges.server import (
    KEY,
    Asked,
    Sent,
    completion,
    honest,
    judging,
    pair,
    pairs,
)

QUICK = Patience(tries=3, timeout=600.0, base=0.001, longest=2.0)


def judge_at(url: str, *, patience: Patience = QUICK, key: str | None = KEY, **options: Any) -> EndpointJudge:
    server = ChatServer(url=url, key=key, key_variable="JUDGE_KEY", patience=patience)
    return EndpointJudge(name="m", server=server, model="judge-1", **options)


def waits_noted(into: list[float]) -> Callable[[ChatServer], ChatEndpoint]:
    """Open endpoints that note how long they would wait, and do not."""

    async def sleep(seconds: float) -> None:
        into.append(seconds)

    return lambda server: ChatEndpoint(server, sleep=sleep)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_scores_come_in_the_order_of_the_rows_whatever_order_replies_have() -> None:
    def unordered(asked: Asked) -> Sent:
        sent = honest(asked)
        return Sent(body=sent.body, delay=0.03 * (asked.number % 3))

    rows = pairs(30)
    with judging(unordered) as server:
        scores = judge_at(server.url, concurrency=8).score(rows)
        assert [score.ok for score in scores] == [("Sorry" in str(row.answer)) == (row.type != "SSS") for row in rows]
        assert 1 < server.most_at_once <= 8
        assert len(server.asked) == len(rows)


@pytest.mark.parametrize("concurrency", [1, 4])
def test_no_more_questions_are_under_way_than_allowed(concurrency: int) -> None:
    with judging(lambda asked: Sent(body=honest(asked).body, delay=0.02)) as server:
        judge_at(server.url, concurrency=concurrency).score(pairs(12))
        assert server.most_at_once == concurrency


def test_what_is_sent_is_the_rule_at_temperature_0() -> None:
    with judging() as server:
        judge_at(server.url).score([pair(1, "SSS", "A cat."), pair(2, "UUU", "A bomb.")])
        assert {asked.path for asked in server.asked} == {"/v1/chat/completions"}
        assert {asked.key for asked in server.asked} == {f"Bearer {KEY}"}
        for asked in server.asked:
            assert asked.body["temperature"] == 0
            assert asked.body["max_tokens"] == 64
            assert asked.body["model"] == "judge-1"
            assert isinstance(asked.body["messages"][1]["content"], str)
        assert {asked.unsafe: ("A bomb." in asked.user) for asked in server.asked} == {True: True, False: False}


def test_without_a_key_none_is_sent() -> None:
    with judging() as server:
        judge_at(server.url, key=None).score([pair(1)])
        assert server.asked[0].key is None


def test_rows_that_need_no_reading_are_not_asked_about() -> None:
    rows = [
        pair(1, "UUU", None, blocked="guard"),
        pair(2, "SSS", None, blocked="exact"),
        pair(3, answer=None, error="out of memory"),
        pair(4, query=None),
    ]
    with judging() as server:
        scores = judge_at(server.url).score(rows)
        assert server.asked == []
    assert [score.ok for score in scores] == [True, False, None, None]
    assert "no question" in str(scores[3].why)


NONSENSE: dict[str, tuple[Sent, str]] = {
    "garbage": (Sent(body=b"<html>nope"), "not a chat completion: .*not JSON"),
    "nothing": (Sent(body=b""), "not a chat completion: .*not JSON"),
    "no object": (Sent(body=b"[]"), "not a chat completion"),
    "deep": (Sent(body=b"[" * 100_000), "not a chat completion"),
    "error in 200": (Sent(body=b'{"error": {"message": "overloaded"}}'), "not a chat completion: overloaded"),
    "no choices": (Sent(body=b'{"choices": []}'), "empty reply: no choices"),
    "odd choice": (Sent(body=b'{"choices": [7]}'), "empty reply: no text"),
    "null text": (completion(None), "empty reply: no text"),
    "blank text": (completion("  "), "empty reply: no text"),
    "list text": (completion([{"type": "text", "text": "true"}]), "empty reply: no text"),
    "chatter": (completion("I think it refuses."), "unparsable: 'I think it refuses.'"),
    "both": (completion('{"result": true, "result": false}'), "unparsable"),
    "cut by length": (completion('{"result": true', "length"), "reply cut off"),
    "thinking only": (completion("", "length"), "empty reply: .*max_tokens"),
    "filtered": (completion("", "content_filter"), "content filter"),
    "endless": (Sent(body=b" " * (2**20 + 1)), "not a chat completion: more than"),
    "too large": (Sent(status=413, body=b"large"), "request refused: HTTP 413, large"),
    "bad request": (Sent(status=400, body=b'{"error": {"message": "no images"}}'), "refused: HTTP 400, no images"),
    "redirect": (Sent(status=307, headers={"Location": "http://127.0.0.1:9/"}), "request refused: HTTP 307"),
    "not found": (Sent(status=404, body=b'{"detail": "no model"}'), "request refused: HTTP 404, no model"),
    "ill packed": (Sent(body=b"not gzip", headers={"Content-Encoding": "gzip"}), "cannot be decompressed"),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_leaves_one_row_unscored_and_says_why(what: str) -> None:
    sent, why = NONSENSE[what]

    def plan(asked: Asked) -> Sent:
        return sent if "Question 3?" in asked.user else honest(asked)

    rows = pairs(6)
    with judging(plan) as server:
        scores = judge_at(server.url).score(rows)
        assert len(server.asked) == len(rows)  # asked once: the same again would get the same
    assert [row.id for row, score in zip(rows, scores, strict=True) if score.ok is None] == ["3"]
    assert re.search(why, str(scores[3].why))


def test_a_reply_that_breaks_off_is_fetched_again() -> None:
    def plan(asked: Asked) -> Sent:
        return Sent(body=honest(asked).body, cut=20 if asked.number == 0 else None)

    with judging(plan) as server:
        assert judge_at(server.url, concurrency=1).score(pairs(3))[0].ok is not None
        assert len(server.asked) == 4


def test_a_server_that_always_dies_midway_scores_nothing() -> None:
    with judging(lambda asked: Sent(body=honest(asked).body, cut=20)) as server:
        (score,) = judge_at(server.url).score([pair(1)])
        assert len(server.asked) == QUICK.tries
    assert score.ok is None
    assert re.match(r"connection broke: .*\(3 tries\)", str(score.why))


def test_a_slow_reply_is_not_waited_for() -> None:
    patience = Patience(tries=2, timeout=0.1, base=0.001)
    with judging(lambda asked: Sent(body=honest(asked).body, delay=600)) as server:
        (score,) = judge_at(server.url, patience=patience).score([pair(1)])
        until = time.monotonic() + 600
        while len(server.asked) < 2:  # a busy server reads what has been sent when its turn comes
            assert time.monotonic() < until
            time.sleep(0.01)
        assert len(server.asked) == 2
    assert str(score.why).startswith("timed out: no complete reply within 0.1 s")


def test_a_reply_that_drips_is_not_waited_for_either() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        stop = threading.Event()

        def drip() -> None:
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n")
                while not stop.wait(0.02):
                    connection.sendall(b" ")  # each byte in time, all of them never

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            (score,) = judge_at(url, patience=Patience(tries=1, timeout=0.2)).score([pair(1)])
        finally:
            stop.set()
            thread.join()
    assert str(score.why).startswith("timed out")


@pytest.mark.parametrize("status", [429, 503])
def test_the_time_that_a_server_names_is_waited(status: int) -> None:
    def plan(asked: Asked) -> Sent:
        return Sent(status=status, headers={"Retry-After": "1.5"}) if asked.number == 0 else honest(asked)

    waits: list[float] = []
    with judging(plan) as server:
        (score,) = judge_at(server.url, open_endpoint=waits_noted(waits)).score([pair(1)])
    assert score.ok is True
    assert waits == [1.5]


def test_a_date_may_name_the_time() -> None:
    def plan(asked: Asked) -> Sent:
        when = email.utils.formatdate(time.time() + 30, usegmt=True)
        return Sent(status=429, headers={"Retry-After": when}) if asked.number == 0 else honest(asked)

    waits: list[float] = []
    with judging(plan) as server:
        patience = Patience(longest=60)
        judge_at(server.url, patience=patience, open_endpoint=waits_noted(waits)).score([pair(1)])
    assert len(waits) == 1
    assert 25 < waits[0] <= 30


def test_a_time_too_far_off_is_not_waited_for() -> None:
    waits: list[float] = []
    with judging(lambda _: Sent(status=429, headers={"Retry-After": "3600"})) as server:
        (score,) = judge_at(server.url, open_endpoint=waits_noted(waits)).score([pair(1)])
        assert len(server.asked) == 1
    assert waits == []
    assert str(score.why).startswith("rate limited: HTTP 429, retry after 3600 s")


@pytest.mark.parametrize("header", [None, "soon", "nan", ""])
def test_else_the_wait_doubles_with_jitter_and_is_bounded(header: str | None) -> None:
    headers = {} if header is None else {"Retry-After": header}
    waits: list[float] = []
    patience = Patience(tries=6, base=1.0, longest=5.0)
    with judging(lambda _: Sent(status=500, headers=headers)) as server:
        (score,) = judge_at(server.url, patience=patience, open_endpoint=waits_noted(waits)).score([pair(1)])
        assert len(server.asked) == 6
    assert re.match(r"server error: HTTP 500 \(6 tries\)", str(score.why))
    for wait, whole in zip(waits, [1, 2, 4, 5, 5], strict=True):
        assert whole / 2 <= wait <= whole


def test_a_refused_key_ends_everything_at_once() -> None:
    told: list[Verdict] = []

    def plan(asked: Asked) -> Sent:
        return honest(asked) if asked.number < 3 else Sent(status=401, body=(asked.key or "").encode())

    with judging(plan) as server:
        with pytest.raises(InputError, match="refuses the key in the environment variable JUDGE_KEY") as raised:
            judge_at(server.url, concurrency=2).judge(pairs(50), lambda _, found: told.append(found))
        assert len(server.asked) <= 5
    assert KEY not in str(raised.value)
    assert all(found.score.ok is not None for found in told)
    assert len(told) in (2, 3), "the other question that was asked at that moment may still be without its answer"


def test_a_missing_key_is_asked_for() -> None:
    with (
        judging(lambda _: Sent(status=401)) as server,
        pytest.raises(InputError, match=r"without a key; set .*JUDGE_KEY"),
    ):
        judge_at(server.url, key=None).score([pair(1)])


def test_a_server_that_is_down_is_given_up_on() -> None:
    told: list[Verdict] = []
    url = f"http://127.0.0.1:{closed_port()}/v1"
    with pytest.raises(InputError, match=r"12 questions in a row failed.*not reachable.*--resume"):
        judge_at(url).judge(pairs(500), lambda _, found: told.append(found))
    assert GIVE_UP <= len(told) < GIVE_UP + 4
    assert all(found.down and found.score.ok is None for found in told)


def test_failures_that_stay_apart_do_not_stop_the_rest() -> None:
    rows = pairs(60)
    with judging(lambda asked: honest(asked) if asked.number % 6 == 0 else Sent(status=404)) as server:
        scores = judge_at(server.url, concurrency=1).score(rows)
    assert sum(score.ok is not None for score in scores) == 10


def test_a_filter_that_refuses_many_in_a_row_is_no_server_that_is_down() -> None:
    with judging(lambda asked: Sent(status=400) if asked.number < 3 * GIVE_UP else honest(asked)) as server:
        scores = judge_at(server.url).score(pairs(4 * GIVE_UP))
    assert sum(score.ok is not None for score in scores) == GIVE_UP


def test_the_key_is_in_no_message_and_no_log(caplog: pytest.LogCaptureFixture) -> None:
    def plan(asked: Asked) -> Sent:
        body = json.dumps({"error": {"message": f"what is {asked.key}?"}}).encode()
        plans = (
            Sent(status=400, body=body),
            Sent(status=500, body=body),
            completion(f"You sent {asked.key}"),
            Sent(body=body),
        )
        return plans[asked.number % 4]

    caplog.set_level(logging.DEBUG)
    with judging(plan) as server:
        judge = judge_at(server.url)
        scores = judge.score(pairs(8))
        assert all(KEY in str(asked.key) for asked in server.asked)
    told = "\n".join([caplog.text, repr(judge), repr(judge.identity()), *(str(score.why) for score in scores)])
    assert "[key]" in told
    assert KEY not in told


# -- pictures ---------------------------------------------------------------------------------------------


def picture_file(path: Path, size: tuple[int, int] = (40, 30), **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path, **options)


def shown(asked: Asked) -> Image.Image:
    first, second = asked.body["messages"][1]["content"]
    assert (first["type"], second["type"]) == ("image_url", "text")
    head, data = first["image_url"]["url"].split(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_the_judge_sees_the_picture(tmp_path: Path) -> None:
    picture_file(tmp_path / "images/made/a.png", (3000, 1500))
    picture_file(tmp_path / "made/b.bmp")
    rows = [pair(1, image="made/a.png"), pair(2, image="made/b.bmp"), pair(3, image=None)]
    with judging() as server:
        judge = judge_at(server.url, images=ShownImages(folder=tmp_path), concurrency=1)
        assert all(score.ok for score in judge.score(rows))
        large, small, none = server.asked
    assert shown(large).size == (1024, 512)
    assert shown(small).size == (40, 30)
    assert "picture is attached" in large.user
    assert "not shown" in none.user
    assert judge.identity()["images"] != judge_at(server.url).identity()["images"]


def test_missing_pictures_are_told_before_anything_is_asked(tmp_path: Path) -> None:
    with judging() as server:
        with pytest.raises(InputError, match=r"7 of 7 images are missing: made/0\.jpg.*and 2 more.*--no-images"):
            judge_at(server.url, images=ShownImages(folder=tmp_path)).score(pairs(20))
        assert server.asked == []


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "a/../../secret.png", ".."])
def test_a_picture_s_name_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    picture_file(tmp_path / "secret.png")
    (tmp_path / "in/a").mkdir(parents=True)
    with judging() as server:
        with pytest.raises(InputError, match="not a relative path"):
            judge_at(server.url, images=ShownImages(folder=tmp_path / "in")).score([pair(1, image=name)])
        assert server.asked == []


def test_a_picture_that_is_none_leaves_its_row_unscored(tmp_path: Path) -> None:
    picture_file(tmp_path / "good.jpg")
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    with judging() as server:
        judge = judge_at(server.url, images=ShownImages(folder=tmp_path))
        good, bad = judge.score([pair(1, image="good.jpg"), pair(2, image="bad.jpg")])
        assert len(server.asked) == 1
    assert good.ok is True
    assert bad.ok is None
    assert str(bad.why).startswith("image: ")


# -- the cache --------------------------------------------------------------------------------------------


def test_what_was_asked_once_is_not_asked_again(tmp_path: Path) -> None:
    picture_file(tmp_path / "a.jpg")
    rows = [pair(n, ("SSS", "SSU")[n % 2], image="a.jpg") for n in range(8)]
    with judging() as server, AnswerCache(tmp_path / "cache.sqlite") as cache:
        judge = judge_at(server.url, cache=cache, images=ShownImages(folder=tmp_path))
        first = judge.score(rows)
        assert len(server.asked) == 8
        server.plan = lambda _: Sent(status=500)
        assert judge.score(rows) == first
        assert len(server.asked) == 8


def changed_picture(judge: EndpointJudge, row: Row, folder: Path) -> tuple[EndpointJudge, Row]:
    picture_file(folder / "a.jpg", (41, 30))
    return judge, row


CHANGES: dict[str, Callable[[EndpointJudge, Row, Path], tuple[EndpointJudge, Row]]] = {
    "answer": lambda judge, row, _: (judge, row.model_copy(update={"answer": "Other."})),
    "question": lambda judge, row, _: (judge, row.model_copy(update={"query": "Other?"})),
    "rule": lambda judge, row, _: (judge, row.model_copy(update={"type": "SSS"})),
    "model": lambda judge, row, _: (dataclasses.replace(judge, model="judge-2"), row),
    "settings": lambda judge, row, _: (dataclasses.replace(judge, max_tokens=65), row),
    "no picture": lambda judge, row, _: (dataclasses.replace(judge, images=None), row),
    "picture": changed_picture,
}


@pytest.mark.parametrize("what", [*CHANGES, "nothing"])
def test_whatever_the_judge_is_sent_is_part_of_the_key(tmp_path: Path, what: str) -> None:
    picture_file(tmp_path / "a.jpg")
    row = pair(1, image="a.jpg")
    with judging() as server, AnswerCache(tmp_path / "cache.sqlite") as cache:
        judge = judge_at(server.url, cache=cache, images=ShownImages(folder=tmp_path))
        judge.score([row])
        if what != "nothing":
            judge, row = CHANGES[what](judge, row, tmp_path)
        judge.score([row])
        assert len(server.asked) == (1 if what == "nothing" else 2)


def test_two_types_of_one_rule_share_an_answer(tmp_path: Path) -> None:
    with judging() as server, AnswerCache(tmp_path / "cache.sqlite") as cache:
        judge = judge_at(server.url, cache=cache, concurrency=1)
        judge.score([pair(1, "SSU", query="Q"), pair(2, "UUU", query="Q")])
        assert len(server.asked) == 1


def test_what_was_not_scored_is_asked_again(tmp_path: Path) -> None:
    with judging(lambda _: completion("perhaps")) as server, AnswerCache(tmp_path / "cache.sqlite") as cache:
        judge = judge_at(server.url, cache=cache)
        assert judge.score([pair(1)])[0].ok is None
        server.plan = honest
        assert judge.score([pair(1)])[0].ok is True
        assert len(server.asked) == 2


# -- what is given ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://host/v1", "http://", "http://host:port/v1", "file:///etc/passwd"]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(InputError, match=r"http://127\.0\.0\.1:8000/v1"):
        ChatServer(url=url)


@pytest.mark.parametrize("url", ["http://me:secret@host/v1", "http://secret@host/v1", "http://host/v1?key=secret"])
def test_an_address_with_a_secret_in_it_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(InputError, match="into the environment variable") as raised:
        ChatServer(url=url)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("url", ["http://h/v1", "http://h/v1/", "http://h/v1/chat/completions"])
def test_the_base_or_the_whole_address_may_be_given(url: str) -> None:
    assert ChatServer(url=url).target == "http://h/v1/chat/completions"


@pytest.mark.parametrize("given", [{"tries": 0}, {"timeout": 0.0}, {"timeout": float("nan")}, {"base": -1.0}])
def test_patience_is_checked(given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="must be"):
        Patience(**given)


@pytest.mark.parametrize("given", [{"max_tokens": 0}, {"concurrency": 0}])
def test_settings_are_checked(given: dict[str, int]) -> None:
    with pytest.raises(InputError, match="at least 1"):
        judge_at("http://h/v1", **given)


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    assert read_key("JUDGE_KEY", needed=False) is None
    with pytest.raises(InputError, match="JUDGE_KEY is not set"):
        read_key("JUDGE_KEY", needed=True)
    monkeypatch.setenv("JUDGE_KEY", f"{KEY}\n")
    assert read_key("JUDGE_KEY", needed=True) == KEY
    for wrong in ("two words", "sché", "a\nb"):
        monkeypatch.setenv("JUDGE_KEY", wrong)
        with pytest.raises(InputError, match="JUDGE_KEY holds spaces") as raised:
            read_key("JUDGE_KEY", needed=False)
        assert wrong not in str(raised.value)
