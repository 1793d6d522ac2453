"""Have a language model judge the pairs of runs.

``python -m benchmarks.judge --run RUN --endpoint URL --judge-model NAME --no-images``

Scores go into each run's own folder (:mod:`benchmarks.judges.stored`) as they come; an interrupted command is resumed
with ``--resume``, which also retries unscored pairs. The same question is never asked twice: answers are cached by
content.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from benchmarks.judges.cache import AnswerCache
from benchmarks.judges.stored import ScoreWriter, check_label
from benchmarks.runs.record import Row, Run, read_run
from safevlm.errors import InputError, MissingExtraError
from safevlm.terminal.commandline import printable, run
from safevlm.terminal.options import json_option

if TYPE_CHECKING:
    from benchmarks.judges.endpoint import EndpointJudge, Verdict

__all__ = ["JudgedRun", "judge_run"]


@dataclass(frozen=True, kw_only=True)
class JudgedRun:
    """What became of a run's pairs: ``unscored`` counts reasons; the rest adds up to the scored ones.

    ``kept`` were scored before, ``by_rule`` have no answer to read (a gate refused them).
    """

    run: str
    pairs: int
    kept: int = 0
    by_rule: int = 0
    from_cache: int = 0
    from_endpoint: int = 0
    unscored: dict[str, int] = field(default_factory=dict)
    example: str | None = None
    """Why the first unscored pair is."""
    down: bool = False
    """Whether questions were asked and the server failed every one."""

    @property
    def scored(self) -> int:
        """Pairs that have a score."""
        return self.kept + self.by_rule + self.from_cache + self.from_endpoint


def judge_run(
    judge: EndpointJudge, writer: ScoreWriter, *, report: Callable[[int], None] = lambda _: None
) -> JudgedRun:
    """Judge the pairs that ``writer``, already entered, has no score of.

    ``report`` gets the number of pairs done since its last call. Raises those of :meth:`EndpointJudge.judge` and
    :meth:`ScoreWriter.write`.
    """
    scored: Counter[str] = Counter()
    unscored: Counter[str] = Counter()
    told: list[str] = []
    reached: list[bool] = []

    def note(_: int, verdict: Verdict) -> None:
        writer.write(verdict.row, verdict.score)
        if verdict.score.ok is not None:
            scored[verdict.source] += 1
        else:
            why = verdict.score.why or "no reason given"
            unscored[why.partition(":")[0]] += 1
            told.append(f"{verdict.row.id}: {why}")
        if verdict.source == "endpoint":
            reached.append(not verdict.down)
        report(1)

    report(len(writer.kept))
    judge.judge(writer.missing, note)
    return JudgedRun(
        run=str(writer.run_folder),
        pairs=len(writer.rows),
        kept=len(writer.kept),
        by_rule=scored["rule"],
        from_cache=scored["cache"],
        from_endpoint=scored["endpoint"],
        unscored=dict(unscored.most_common()),
        example=told[0] if told else None,
        down=bool(reached) and not any(reached),
    )


@click.command()
@click.option(
    "--run", "runs", type=click.Path(path_type=Path), multiple=True, required=True, help="Checkpoint; repeatable."
)
@click.option(
    "--endpoint",
    required=True,
    metavar="URL",
    help="Base URL of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1.",
)
@click.option("--judge-model", required=True, help="Name of the judging model at the endpoint.")
@click.option("--name", help="Name of the judge in reports.  [default: from --judge-model]")
@click.option("--images", type=click.Path(path_type=Path, file_okay=False), help="Folder that image names start from.")
@click.option("--no-images", is_flag=True, help="Judge by the text alone, without images.")
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    default=Path("build/judge-cache.sqlite"),
    show_default=True,
    help="SQLite file of replies, shared by runs.",
)
@click.option("--resume", is_flag=True, help="Keep existing scores and retry what is unscored.")
@click.option(
    "--concurrency",
    type=click.IntRange(1, 256),
    default=4,
    show_default=True,
    help="Maximum number of concurrent requests.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Maximum length of the judge's reply in tokens.",
)
@click.option("--tries", type=click.IntRange(min=1), default=5, show_default=True, help="Number of tries per question.")
@click.option("--timeout", type=float, default=60.0, show_default=True, help="Seconds per try.")
@click.option(
    "--api-key-env", help="Environment variable that holds the API key.  [default: OPENAI_API_KEY, where it is set]"
)
@json_option("counts")
def main(runs: Sequence[Path], cache: Path, resume: bool, as_json: bool, **given: Any) -> None:
    """Have a language model judge whether unsafe pairs were refused and safe ones answered."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    found = {folder: _pairs(read_run(folder)) for folder in _distinct(runs)}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with ExitStack() as held:
        judge = _judge(held.enter_context(AnswerCache(cache)), **given)
        for rows in found.values():
            judge.check(rows)
        open_writer = partial(
            ScoreWriter, label=judge.name, identity=judge.identity(), endpoint=judge.server.url, resume=resume
        )
        writers = [open_writer(folder, rows=rows) for folder, rows in found.items()]
        for writer in writers:  # all of them, before the first question is paid for
            held.enter_context(writer)
        progress = held.enter_context(Progress(*columns, console=Console(stderr=True), transient=True))
        judged = []
        for writer in writers:
            task = progress.add_task(escape(writer.run_folder.name), total=len(writer.rows))
            judged.append(judge_run(judge, writer, report=partial(progress.advance, task)))
    _tell(judge, judged, as_json)
    _refuse_nothing(judge, judged)


def _judge(
    cache: AnswerCache,
    *,
    endpoint: str,
    judge_model: str,
    name: str | None,
    images: Path | None,
    no_images: bool,
    concurrency: int,
    max_tokens: int,
    tries: int,
    timeout: float,
    api_key_env: str | None,
) -> EndpointJudge:
    try:
        from benchmarks.judges.chat_endpoint import ChatServer, Patience
        from benchmarks.judges.endpoint import EndpointJudge
        from benchmarks.judges.images import ShownImages
        from safevlm.terminal.api_key import read_key
    except ModuleNotFoundError as error:
        if error.name != "httpx":
            raise
        raise MissingExtraError("httpx", "report", "a language model as judge") from error
    if (images is None) != no_images:
        raise InputError("give either --images DIR, so that the judge sees the images, or --no-images.")
    label = name if name is not None else re.sub(r"[^A-Za-z0-9._-]+", "-", judge_model).strip("-._")
    check_label(label)
    variable = api_key_env or "OPENAI_API_KEY"
    key = read_key(variable, needed=api_key_env is not None)
    patience = Patience(tries=tries, timeout=timeout)
    return EndpointJudge(
        name=label,
        server=ChatServer(url=endpoint, key=key, key_variable=variable, patience=patience),
        model=judge_model,
        images=None if images is None else ShownImages(folder=images),
        cache=cache,
        max_tokens=max_tokens,
        concurrency=concurrency,
    )


def _distinct(runs: Sequence[Path]) -> Sequence[Path]:
    seen: set[Path] = set()
    for folder in runs:
        if folder.resolve() in seen:
            raise InputError(f"--run {folder} is given twice.")
        seen.add(folder.resolve())
    return runs


def _pairs(found: Run) -> list[Row]:
    rows = [row for row in found.rows if row.kind == "pair"]
    if not rows:
        raise InputError(f"{found.folder} has no pairs to judge. Give a run of holisafe or holisafe-mini.")
    return rows


def _tell(judge: EndpointJudge, judged: Sequence[JudgedRun], as_json: bool) -> None:
    if as_json:
        counts = [{**asdict(each), "scored": each.scored} for each in judged]
        click.echo(json.dumps({"judge": judge.name, "identity": judge.identity(), "runs": counts}, indent=1))
        return
    for each in judged:
        click.echo(
            printable(
                f"{each.run}: judge {judge.name} scored {each.scored} of {each.pairs} pairs ({each.kept} were scored "
                f"before, {each.from_cache} from the cache, {each.by_rule} blocked by a gate)"
            )
        )
        for reason, count in each.unscored.items():
            click.echo(printable(f"  unscored: {count} × {reason}"))
        if each.example is not None:
            click.echo(printable(f"  the first: {each.example}\n  --resume retries these"))


def _refuse_nothing(judge: EndpointJudge, judged: Sequence[JudgedRun]) -> None:
    """End with an error when the server never answered, or nothing at all has a score."""
    example = next((each.example for each in judged if each.example is not None), None)
    if any(each.down for each in judged):
        raise InputError(
            f"{judge.server.url} answered none of the questions ({example}). Check --endpoint, and resume with "
            "--resume."
        )
    if not any(each.scored for each in judged):
        raise InputError(f"judge {judge.name} could not score a single pair ({example}).")


if __name__ == "__main__":
    run(main)
