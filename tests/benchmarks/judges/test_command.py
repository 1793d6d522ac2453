"""``python -m benchmarks.judge``: scores beside the run, killed and resumed, and no key anywhere."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from benchmarks.judges.select import open_judge
from benchmarks.judges.stored import stored_judges
from tests.benchmarks.judges.server import (
    KEY,
    Asked,
    JudgeServer,
    Sent,
    completion,
    honest,
    judging,
    make_run,
    pair,
    pairs,
)

ROOT = Path(__file__).parents[3]


def command(run: Path, url: str, *more: str | Path) -> list[str]:
    cache = run.parent / "cache.sqlite"
    given = ["--run", run, "--endpoint", url, "--judge-model", "maker/judge-1", "--cache", cache, *more]
    return [sys.executable, "-m", "benchmarks.judge", *map(str, given)]


def environment() -> dict[str, str]:
    return {**os.environ, "OPENAI_API_KEY": KEY, "NO_PROXY": "127.0.0.1"}


def judge(run: Path, url: str, *more: str | Path) -> subprocess.CompletedProcess[str]:
    options = more if "--images" in more else ("--no-images", *more)
    done = subprocess.run(
        command(run, url, *options), capture_output=True, text=True, cwd=ROOT, timeout=600, env=environment()
    )
    assert "Traceback" not in done.stderr
    assert KEY not in done.stdout + done.stderr
    for path in run.parent.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()
    return done


def lines(run: Path, label: str = "maker-judge-1") -> list[dict[str, Any]]:
    text = (run / "judges" / f"{label}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_scores_stand_beside_the_run_and_are_read_back(tmp_path: Path) -> None:
    rows = [*pairs(10), pair(10, "SSS", None, blocked="guard"), pair(11, answer=None, error="died")]
    run, other = make_run(tmp_path / "run", rows), make_run(tmp_path / "other", pairs(10))
    with judging() as server:
        done = judge(run, server.url, "--run", other, "--json", "--concurrency", "1")
        assert len(server.asked) == 10  # the other run says the same
        assert {asked.key for asked in server.asked} == {f"Bearer {KEY}"}
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)["runs"]
    assert (first["pairs"], first["scored"], first["from_endpoint"], first["by_rule"]) == (12, 11, 10, 1)
    assert first["unscored"] == {"the row failed": 1}
    assert (second["scored"], second["from_cache"], second["from_endpoint"]) == (10, 10, 0)
    assert stored_judges(run) == ("maker-judge-1",)
    stored = open_judge("maker-judge-1", run)
    assert stored.identity() == json.loads(done.stdout)["identity"]
    scores = stored.score(rows)
    assert [score.ok for score in scores[:10]] == [
        ("Sorry" in str(row.answer)) == (row.type != "SSS") for row in rows[:10]
    ]
    assert [score.ok for score in scores[10:]] == [False, None]


def test_resume_tries_the_unscored_again_and_doubles_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", pairs(12))

    def moody(asked: Asked) -> Sent:
        return completion("Hard to say.") if asked.number % 3 == 0 else honest(asked)

    with judging(moody) as server:
        done = judge(run, server.url)
        assert done.returncode == 0, done.stderr
        assert "scored 8 of 12 pairs" in done.stdout
        assert "4 × unparsable" in done.stdout
        assert sum(line["ok"] is None for line in lines(run)) == 4
        again = judge(run, server.url)
        assert again.returncode == 2
        assert "--resume" in again.stderr
        server.plan = honest
        done = judge(run, server.url, "--resume")
        assert done.returncode == 0, done.stderr
        assert "scored 12 of 12 pairs (8 were scored before" in done.stdout
        assert len(server.asked) == 16
    assert sorted(int(line["id"]) for line in lines(run)) == list(range(12))
    assert all(line["ok"] is not None for line in lines(run))


def kill_midway(server: JudgeServer, run: Path, after: int, *more: str) -> None:
    """Kill the command, as hard as can be, when the server has been asked so many questions."""
    reached = threading.Event()

    def plan(asked: Asked) -> Sent:
        if asked.number >= after:
            reached.set()
            return Sent(body=honest(asked).body, delay=600)
        return honest(asked)

    server.plan = plan
    process = subprocess.Popen(
        command(run, server.url, "--no-images", *more),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert reached.wait(600)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_a_killed_command_goes_on_and_gives_each_id_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", pairs(40))
    with judging() as server:
        kill_midway(server, run, 9)
        seen = {line["id"] for line in lines(run)}
        assert 5 <= len(seen) <= 9
        kill_midway(server, run, len(server.asked) + 11, "--resume")
        assert seen < {line["id"] for line in lines(run)}
        with (run / "judges/maker-judge-1.jsonl").open("ab") as stream:
            stream.write(b'{"id": "39", "o')  # a write that the kill cut
        server.plan = honest
        done = judge(run, server.url, "--resume")
        assert done.returncode == 0, done.stderr
    assert sorted(int(line["id"]) for line in lines(run)) == list(range(40))
    scores = open_judge("maker-judge-1", run).score(pairs(40))
    assert [score.ok for score in scores] == [("Sorry" in str(row.answer)) == (row.type != "SSS") for row in pairs(40)]


def test_a_refused_key_is_exit_2(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", pairs(30))
    with judging(lambda asked: Sent(status=401, body=str(asked.key).encode())) as server:
        done = judge(run, server.url)
        assert len(server.asked) <= 4
    assert done.returncode == 2
    assert "refuses the key in the environment variable OPENAI_API_KEY" in done.stderr


@pytest.mark.parametrize("count", [3, 30])
def test_a_server_that_is_not_there_is_exit_2(tmp_path: Path, count: int) -> None:
    run = make_run(tmp_path / "run", pairs(count))
    with judging() as server:
        url = server.url
    done = judge(run, url, "--tries", "1")
    assert done.returncode == 2
    assert "not reachable" in done.stderr
    with judging() as server:  # and goes on when it is up
        assert judge(run, server.url, "--resume").returncode == 0
    assert sorted(int(line["id"]) for line in lines(run)) == list(range(count))


def test_nothing_but_nonsense_is_exit_2(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", pairs(5))
    with judging(lambda _: completion("Lovely weather.")) as server:
        done = judge(run, server.url)
    assert done.returncode == 2
    assert "could not score a single pair" in done.stderr
    assert "unparsable" in done.stderr


def test_every_run_is_looked_at_before_the_first_question(tmp_path: Path) -> None:
    run, other = make_run(tmp_path / "run", pairs(4)), make_run(tmp_path / "other", pairs(4))
    with judging() as server:
        assert judge(other, server.url).returncode == 0
        asked = len(server.asked)
        done = judge(run, server.url, "--run", other)
        assert done.returncode == 2
        assert "other/judges/maker-judge-1.jsonl already exists" in done.stderr
        assert len(server.asked) == asked


def question_run(folder: Path) -> Path:
    row = pair(1).model_copy(update={"kind": "question", "type": None})
    return make_run(folder, [row])


def test_bad_input_is_exit_2_with_what_to_do(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", pairs(4))
    url = "http://127.0.0.1:9/v1"
    wrong: list[tuple[Path, str, tuple[str | Path, ...], str]] = [
        (tmp_path / "none", url, (), "there is no such file"),
        (question_run(tmp_path / "q"), url, (), "no pairs to judge"),
        (run, "127.0.0.1:9", (), "http"),
        (run, url, ("--images", tmp_path), "4 of 4 images are missing"),
        (run, url, ("--name", "string"), "cannot be named 'string'"),
        (run, url, ("--name", "../x"), "cannot be named"),
        (run, url, ("--run", run), "given twice"),
        (run, url, ("--api-key-env", "NO_SUCH_KEY"), "NO_SUCH_KEY is not set"),
        (run, url, ("--timeout", "0"), "timeout is 0"),
        (run, url, ("--cache", tmp_path), "cache .* cannot be used"),
    ]
    for folder, endpoint, options, message in wrong:
        done = judge(folder, endpoint, *options)
        assert done.returncode == 2, (options, done.stderr)
        assert re.search(message, done.stderr), done.stderr
    assert not (run / "judges").exists()


def test_seeing_pictures_or_not_has_to_be_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", pairs(4))
    for options in ((), ("--images", str(tmp_path), "--no-images")):
        done = subprocess.run(
            command(run, "http://127.0.0.1:9/v1", *options), capture_output=True, text=True, cwd=ROOT, timeout=600
        )
        assert done.returncode == 2
        assert "either --images DIR" in done.stderr
