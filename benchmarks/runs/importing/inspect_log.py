"""Logs of inspect_ai: ``.eval``, a ZIP file of JSON (compressed with zstandard since 2026), or one ``.json``.

``header.json`` says what ran (``eval``, ``status``); ``samples/<id>_epoch_<n>.json`` is one sample with ``input``,
``target``, ``output`` and ``scores``. A sample whose ``metadata`` holds one of the pair types as ``type`` is a pair,
for our judges.
"""

from __future__ import annotations

import re
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.runs.importing.imported import distinct, id_of, imported_run, number_of, share_of, suite_of
from benchmarks.runs.record import PAIR_TYPES, Row, Run
from safevlm.errors import InputError, MissingExtraError
from safevlm.files.json_file import parse_json
from safevlm.files.regular_file import open_regular

if TYPE_CHECKING:
    import zipfile

__all__ = ["import_inspect"]

SAMPLE_NAME = re.compile(r"samples/.+\.json")
MAX_BYTES = 2**31
"""Of the uncompressed JSON: events and attachments of a benchmark's log take some megabytes."""
BLOCKED = ("guard", "exact", "error")
VALUES = {"C": 1.0, "I": 0.0, "P": 0.5, "N": 0.0}
"""inspect_ai's letters: correct, incorrect, partially correct, no answer."""

Found = tuple[str, Mapping[str, Any]]


def import_inspect(
    path: Path, *, name: str | None = None, task: str | None = None, metric: str | None = None, epoch: int | None = None
) -> Run:
    """Return a log's samples as a run: pairs, or questions with scores.

    ``metric`` chooses the scorer and ``epoch`` the decoding where there are several; ``name`` is by default the log's
    model and ``task`` its task.

    Raises InputError, with the sample, for a log that is cut off, unfinished or failed, several epochs or scorers of
    which none was chosen, an id that comes twice, or a score outside 0..1; MissingExtraError without what reads
    zstandard.
    """
    header, samples = _content(path)
    status, asked = header.get("status"), header.get("eval")
    if status != "success" or not isinstance(asked, Mapping):
        raise InputError(
            f"{path}: the log's status is {status!r}, so samples may be missing. Give a log that succeeded."
        )
    results = header.get("results")
    completed = number_of(results.get("completed_samples")) if isinstance(results, Mapping) else None
    if completed is not None and len(samples) < completed:
        raise InputError(f"{path} holds {len(samples)} of the {completed:g} samples that were answered. Give all.")
    task, name = task or _word(asked.get("task"), "task"), name or _word(asked.get("model"), "model")
    samples = _of_epoch(path, samples, epoch)
    scorer = _scorer(path, samples, metric)
    rows = distinct(((where, _row(raw, scorer, where)) for where, raw in samples), path)
    scored_by = None if scorer is None else f"inspect_ai, task {task}, scorer {scorer}"
    return imported_run(path, name, suite_of(task, rows, scored_by=scored_by), rows, scored_by=scored_by)


def _word(value: Any, default: str) -> str:
    return value if isinstance(value, str) and value else default


# -- the file ---------------------------------------------------------------------------------------------


def _content(path: Path) -> tuple[Mapping[str, Any], list[Found]]:
    """Return the header, and the samples with their places."""
    if path.suffix == ".json":
        whole = _json(_bytes(path), str(path))
        samples = whole.get("samples")
        if not isinstance(samples, list):
            raise InputError(f"{path} is not a log of inspect_ai: 'samples' is missing. Log the samples, too.")
        return whole, [
            (f"{path}, sample {n}", _mapping(each, f"{path}, sample {n}")) for n, each in enumerate(samples, 1)
        ]
    with _opened(path) as archive:
        names = archive.namelist()
        if "header.json" not in names:
            raise InputError(f"{path}: header.json is missing, so the log is unfinished. Give the log of a whole run.")
        if sum(each.file_size for each in archive.infolist()) > MAX_BYTES:
            raise InputError(f"{path}: more than {MAX_BYTES:,} bytes of JSON, too many for the log of a benchmark.")
        header = _json(archive.read("header.json"), f"{path}, header.json")
        samples = [each for each in dict.fromkeys(names) if SAMPLE_NAME.fullmatch(each)]
        return header, [(f"{path}, {each}", _json(archive.read(each), f"{path}, {each}")) for each in samples]


def _bytes(path: Path) -> bytes:
    try:
        with open_regular(path) as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from error
    if len(data) > MAX_BYTES:
        raise InputError(f"{path}: more than {MAX_BYTES:,} bytes of JSON, too many for the log of a benchmark.")
    return data


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive; what is wrong with it, while it is read too, is said."""
    reader, torn = _zipfile()
    try:
        with open_regular(path) as stream, reader.ZipFile(stream) as archive:
            yield archive
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file.") from None
    except NotImplementedError as error:  # another compression method
        raise InputError(f"{path}: cannot be read ({error}). Write the log as JSON: inspect log convert.") from error
    except (OSError, EOFError, ValueError, RuntimeError, reader.BadZipFile, zlib.error, torn) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{path} is not a whole .eval file ({reason}). Copy it again, or give the whole log."
        ) from error


def _zipfile() -> tuple[Any, type[Exception]]:
    """Return a zipfile module that knows zstandard, Python's own from 3.14 on, and what it raises for damage there."""
    if sys.version_info >= (3, 14):
        import zipfile

        from compression.zstd import ZstdError

        return zipfile, ZstdError
    try:
        from backports.zstd import ZstdError
        from backports.zstd import zipfile as with_zstandard
    except ModuleNotFoundError as error:
        raise MissingExtraError("backports.zstd", "logs", "reading .eval logs") from error
    return with_zstandard, ZstdError


def _json(content: bytes, where: str) -> Mapping[str, Any]:
    try:
        return _mapping(parse_json(content, rows=True, halves=True), where)
    except ValueError as error:
        raise InputError(f"{where} is not valid JSON ({error}). Give the log as it was written.") from error


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{where} must be a JSON object, not {type(value).__name__}.")
    return value


# -- the samples ------------------------------------------------------------------------------------------


def _of_epoch(path: Path, samples: Sequence[Found], epoch: int | None) -> list[Found]:
    there = sorted({number for _, raw in samples if isinstance(number := raw.get("epoch", 1), int)})
    shown = ", ".join(map(str, there)) or "none"
    if epoch is None and len(there) > 1:
        raise InputError(f"{path}: each sample was answered in {len(there)} epochs. Give --epoch, one of {shown}.")
    if epoch is not None and epoch not in there:
        raise InputError(f"{path} has no epoch {epoch}. It has {shown}.")
    return [each for each in samples if epoch is None or each[1].get("epoch", 1) == epoch]


def _scorer(path: Path, samples: Sequence[Found], metric: str | None) -> str | None:
    """Return the scorer to read, None where nothing was scored."""
    there = list(dict.fromkeys(name for _, raw in samples for name in _scores(raw)))
    if metric is not None and metric not in there:
        raise InputError(f"{path} has no scorer {metric!r}. It has {', '.join(there) or 'none'}.")
    if metric is None and len(there) > 1 and not all(_pair_type(raw) for _, raw in samples):
        raise InputError(f"{path}: the metric is not clear. Give --metric, one of {', '.join(there)}.")
    return metric or (there[0] if len(there) == 1 else None)


def _row(raw: Mapping[str, Any], scorer: str | None, where: str) -> Row:
    known = raw.get("metadata")
    metadata: Mapping[str, Any] = known if isinstance(known, Mapping) else {}
    kind = _pair_type(raw)
    error = raw.get("error")
    if metadata.get("kind") == "image" and "probs" in metadata:  # a guard's run that benchmarks.export wrote
        raise InputError(f"{where}: a guard judged the image, and nothing was answered. Give the guard's run itself.")
    label = metadata.get("label") if metadata.get("kind") in ("pair", "question") else None
    row = Row(
        id=id_of(raw.get("id"), where, "id"),
        kind="question" if kind is None else "pair",
        type=kind,
        query=_asked(raw) or None,
        reference=None if kind else _target(raw.get("target")),
        label=label if isinstance(label, int) and not isinstance(label, bool) and label >= 0 else None,
        **{
            name: metadata[name] for name in ("image", "category", "subcategory") if isinstance(metadata.get(name), str)
        },
    )
    if error is not None:
        told = error.get("message") if isinstance(error, Mapping) else error
        return row.model_copy(update={"error": f"the sample failed: {told}"})
    score = _scores(raw).get(scorer) if scorer is not None else None
    value = score.get("value") if isinstance(score, Mapping) else None
    answer: str | None = _said(raw, where)
    if not answer and metadata.get("blocked") in BLOCKED:  # exported by benchmarks.export: a gate stood before
        row, answer = row.model_copy(update={"blocked": metadata["blocked"]}), None
    if value is None:
        return row.model_copy(update={"answer": answer})
    found = VALUES.get(value, value) if isinstance(value, str) else value
    return row.model_copy(update={"answer": answer, "score": share_of(found, where, f"scorer {scorer!r}")})


def _scores(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    scores = raw.get("scores")
    return scores if isinstance(scores, Mapping) else {}


def _pair_type(raw: Mapping[str, Any]) -> Any:
    metadata = raw.get("metadata")
    kind = metadata.get("type") if isinstance(metadata, Mapping) else None
    return kind if isinstance(kind, str) and kind in PAIR_TYPES else None


def _said(raw: Mapping[str, Any], where: str) -> str:
    """Return the completion. Raises InputError for a sample without one, or with several choices."""
    output = raw.get("output")
    choices = output.get("choices") if isinstance(output, Mapping) else None
    if isinstance(choices, list) and len(choices) > 1:
        raise InputError(
            f"{where}: the sample has {len(choices)} answers, and one is read. Give a log with one choice."
        )
    said = output.get("completion") if isinstance(output, Mapping) else None
    if not isinstance(said, str):
        said = _text(_message(choices).get("content"), raw)
    if not isinstance(said, str):
        raise InputError(f"{where}: the sample has no output. Give a log of samples that were answered.")
    return _attached(said, raw)


def _message(choices: Any) -> Mapping[str, Any]:
    first = choices[0] if isinstance(choices, list) and choices else None
    message = first.get("message") if isinstance(first, Mapping) else None
    return message if isinstance(message, Mapping) else {}


def _asked(raw: Mapping[str, Any]) -> str | None:
    """Return the text that was asked: the input, of messages the user's."""
    given = raw.get("input")
    if isinstance(given, list):
        asked = [each.get("content") for each in given if isinstance(each, Mapping) and each.get("role") == "user"]
        given = "\n".join(text for each in asked if (text := _text(each, raw)))
    return _attached(given, raw) if isinstance(given, str) else None


def _text(content: Any, raw: Mapping[str, Any]) -> str | None:
    """Return a message's text, without its images."""
    if isinstance(content, list):
        texts = [each["text"] for each in content if isinstance(each, Mapping) and isinstance(each.get("text"), str)]
        return "\n".join(_attached(each, raw) for each in texts)
    return content if isinstance(content, str) else None


def _attached(text: str, raw: Mapping[str, Any]) -> str:
    """Return a text that may be logged apart, as ``attachment://<hash>``."""
    attachments = raw.get("attachments")
    if text.startswith("attachment://") and isinstance(attachments, Mapping):
        return str(attachments.get(text.removeprefix("attachment://"), text))
    return text


def _target(value: Any) -> str | None:
    if isinstance(value, list):
        return " | ".join(map(str, value))
    return None if value is None else str(value)
