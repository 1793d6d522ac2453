"""Conversations to calibrate on, one :class:`Sample` each: a question, perhaps its image and its answer.

Read are JSONL files, JSON lists, and tables with a column ``query``, whose rows have one of three shapes::

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "?"}]}]}
    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\n?"}, {"from": "gpt", "value": "!"}]}
    {"image": "a.jpg", "query": "?", "type": "SSU", "image_safe": true}

the second as LLaVA has it (and Qwen-VL, with ``<img>a.jpg</img>`` in the text), the third as HoliSafe-Bench. Fields
that are null or empty count as absent. One question and its answer make a sample: later turns and
system turns are left out, and counted. ``kind`` may stand in any row; see :func:`read_conversations` for where it is
taken from else.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeAlias

from PIL import Image

from calibration.holisafe_mini.questions import PAIR_TYPES
from calibration.holisafe_mini.scene import Scene, draw
from calibration.holisafe_mini.suite import build_suite
from calibration.labelled.rows import image_file, image_name, is_nothing, read_rows
from calibration.labelled.tables import Columns, cleaned, truth
from calibration.sets.pictures import BuiltIn
from calibration.sets.refusals import is_refusal
from safevlm.errors import ImageFileError, InputError
from safevlm.images.image import open_image

__all__ = ["KINDS", "Conversations", "Drawn", "Kind", "Sample", "built_in_conversations", "read_conversations"]

Kind: TypeAlias = Literal["unsafe", "safe", "text"]
KINDS: tuple[Kind, ...] = ("unsafe", "safe", "text")
"""A pair to be refused, a pair to be answered, a text without an image."""

NAMED_IMAGE = re.compile(r"(?:Picture\s*\d+\s*:\s*)?<(img|image)>([^<>]*)</\1>")
"""An image as Qwen-VL's rows have it: ``Picture 1: <img>a.jpg</img>``."""
PLACEHOLDER = re.compile(r"<image>|(?:<\|vision_start\|>)?(?:<\|image_pad\|>)+(?:<\|vision_end\|>)?|<start_of_image>")
"""Where the row's image is shown: LLaVA's, Qwen2-VL's and Gemma-3's marks."""
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant"}
SHAPES = ("messages", "conversations", "query")
COLUMNS = Columns(needed=(("query",),), optional=("image", "images", "answer", "kind", "type", "image_safe"))


@dataclass(frozen=True)
class Drawn:
    """A image of holisafe-mini, drawn when it is looked at."""

    scene: Scene


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question to calibrate on.

    ``name`` is the image's name as its source states it, the same on every machine; ``where`` is the sample's
    place in its source, for messages.
    """

    kind: Kind
    question: str
    answer: str | None
    image: Path | Drawn | None
    name: str
    where: str

    def picture(self) -> Image.Image | None:
        """Return the image in RGB, upright. Raises ImageFileError, with the sample's place."""
        if isinstance(self.image, Drawn):
            return draw(self.image.scene)
        if self.image is None:
            return None
        try:
            return open_image(self.image)
        except ImageFileError as error:
            raise ImageFileError(f"{self.where}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Conversations:
    """The samples of a source and what reading it did; ``sha256`` is that of the source's bytes."""

    samples: tuple[Sample, ...]
    source: str
    sha256: str | None = None
    """``None`` for what is built in."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """How many ``later turns`` and ``system turns`` are not part of a sample."""
    kinds_from_answers: int = 0
    """Samples held unsafe because their answer is a refusal, or safe because it is none: no field said it."""


@dataclass(frozen=True)
class _Turn:
    role: str
    text: str
    images: tuple[str | None, ...]
    """Named in the turn; ``None`` for a placeholder that names none."""


def read_conversations(path: Path, images: Path | None = None, *, kinds: bool = True) -> Conversations:
    """Read JSONL, JSON or a table; image names are relative to ``images``, by default to the file or its ``images/``.

    A sample is the first user turn and the assistant's turn right after it, if there is one that is not blank. A
    row without an image is of kind ``text``. The kind of one with an image is ``kind``, else that of HoliSafe's
    ``type`` (its last letter, the pair's), else of ``image_safe``, else unsafe if the answer is a refusal and safe if
    it is none (counted in ``kinds_from_answers``). ``kinds=False`` is for suites, of which no kind is asked.

    Raises InputError, with the line's or row's number, for a row of no known shape, without a question, with
    several images, an image that is missing or only part of a later turn, without any sign of its kind; for a file
    that is empty or no JSON. Images are not decoded here.
    """
    rows, sha256 = read_rows(path, COLUMNS)
    folders = [images] if images is not None else [path.parent, path.parent / "images"]
    samples: list[Sample] = []
    left_out: Counter[str] = Counter()
    guessed = 0
    for where, stored in rows:
        row = {key: value for key, value in stored.items() if not is_nothing(value)}
        question, answer, name, dropped = _parsed(row, where)
        left_out.update(dropped)
        kind = _stated_kind(row, name, where)
        if kind is None and kinds:
            kind = _kind_of_answer(answer, where)
            guessed += 1
        samples.append(
            Sample(
                kind=kind or "safe",
                question=question,
                answer=answer,
                image=None if name is None else image_file(name, folders, where),
                name=name or "",
                where=where,
            )
        )
    if not samples:
        raise InputError(f"{path} has no rows. Each needs one of {', '.join(SHAPES)}.")
    return Conversations(
        samples=tuple(samples), source=str(path), sha256=sha256, left_out=dict(left_out), kinds_from_answers=guessed
    )


def built_in_conversations(pictures: BuiltIn = BuiltIn()) -> Conversations:
    """Return the pairs of holisafe-mini's calibration part with their right answers, and everyday text prompts."""
    suite = build_suite("calibration", pairs=pictures.pairs, questions=0)
    scenes = {picture.path: picture.scene for picture in suite.pictures}
    pairs = [
        Sample(
            kind="safe" if item.row["type"] == "SSS" else "unsafe",
            question=item.row["query"],
            answer=item.answer,
            image=Drawn(scenes[item.row["image"]]),
            name=item.row["image"],
            where=f"{pictures}, pair {item.row['id']}",
        )
        for item in suite.pairs
    ]
    prompts: list[str] = json.loads(
        resources.files("calibration.sets").joinpath("text_prompts.json").read_text(encoding="utf-8")
    )
    texts = [
        Sample(kind="text", question=prompt, answer=None, image=None, name="", where=f"built-in text prompt {number}")
        for number, prompt in enumerate(prompts, 1)
    ]
    return Conversations(samples=(*pairs, *texts), source=f"{pictures}, and built-in text prompts")


# -- one row ----------------------------------------------------------------------------------------------


def _parsed(row: Mapping[str, Any], where: str) -> tuple[str, str | None, str | None, Counter[str]]:
    """Return a row's question, answer and image name, and what of it is left out."""
    shapes = [shape for shape in SHAPES if shape in row]
    if len(shapes) != 1:
        found = f"both {' and '.join(shapes)}" if shapes else f"none of {', '.join(SHAPES)}"
        filled = ", ".join(map(str, row)) or "nothing"
        raise InputError(f"{where}: the row has {found}; it must have exactly one of them. It has {filled[:120]}.")
    turns, system = _turns(row, shapes[0], where)
    if not turns or turns[0].role != "user":
        raise InputError(f"{where}: the conversation must begin with a user turn, the question.")
    first, rest = turns[0], turns[1:]
    answer = rest[0].text if rest and rest[0].role == "assistant" else None
    name = _image_name(row, first, rest, where)
    if not first.text:
        raise InputError(f"{where}: the question is empty. Give the first user turn a text, or leave the row out.")
    dropped = Counter({"later turns": len(rest) - (answer is not None), "system turns": system})
    return first.text, answer or None, name, +dropped


def _turns(row: Mapping[str, Any], shape: str, where: str) -> tuple[list[_Turn], int]:
    """Bring a row of any shape to turns, blanks stripped; return them and the number of system turns passed over."""
    if shape == "query":
        pair = [{"role": "user", "content": row["query"]}, {"role": "assistant", "content": row.get("answer", "")}]
        return [_turn(turn, "role", "content", where) for turn in pair], 0
    role, content = ("role", "content") if shape == "messages" else ("from", "value")
    turns = row[shape]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise InputError(
            f"{where}: '{shape}' must be a list of turns. Each turn is an object with '{role}' and '{content}'."
        )
    asked = [turn for turn in turns if turn.get(role) != "system"]
    return [_turn(turn, role, content, where) for turn in asked], len(turns) - len(asked)


def _turn(turn: Mapping[str, Any], role: str, content: str, where: str) -> _Turn:
    known = ROLES.get(turn.get(role, "")) if isinstance(turn.get(role), str) else None
    if known is None:
        raise InputError(f"{where}: '{role}' is {turn.get(role)!r}; one of {', '.join(ROLES)} or system is allowed.")
    value = turn.get(content)
    texts: list[str] = []
    images: list[str | None] = []
    for part in value if isinstance(value, list) else [value]:
        stated: Mapping[str, Any] = part if isinstance(part, dict) else {"type": "text", "text": part}
        kind = stated.get("type")
        if kind == "text" and isinstance(stated.get("text"), str):
            text = stated["text"]
            if known == "user":
                text, shown = _shown(text, where)
                images += shown
            texts.append(text.strip())
        elif kind in ("image", "image_url"):
            images.append(_part_image(stated, where))
        else:
            raise InputError(f"{where}: '{content}' must be a string, or a list of parts of type text or image.")
    return _Turn(known, "\n".join(text for text in texts if text), tuple(images))


def _shown(text: str, where: str) -> tuple[str, list[str | None]]:
    """Return a question without the images in it, and those: named as Qwen-VL does, or ``None`` for a placeholder."""
    named: list[str | None] = [found[2].strip() or None for found in NAMED_IMAGE.finditer(text)]
    text = NAMED_IMAGE.sub("", text)
    if "<img>" in text or "</img>" in text:
        raise InputError(
            f"{where}: an image in the text must begin with <img> and end with </img>; one of them is missing."
        )
    return PLACEHOLDER.sub("", text), named + [None] * len(PLACEHOLDER.findall(text))


def _part_image(part: Mapping[str, Any], where: str) -> str | None:
    value = next((part[key] for key in ("image", "path", "url", "image_url") if part.get(key) is not None), None)
    return None if value is None else image_name(value, where)


def _image_name(row: Mapping[str, Any], first: _Turn, rest: Sequence[_Turn], where: str) -> str | None:
    """Return the one image that the first turn is about, or ``None`` for a text."""
    stated = [each for key in ("image", "images") for each in _listed(row.get(key)) if not is_nothing(each)]
    names = list(dict.fromkeys(image_name(each, where) for each in stated))
    shown = [name for name in first.images if name is not None]
    if max(len(names), len(shown), len(first.images)) > 1 or (names and shown and names != shown):
        raise InputError(
            f"{where}: the question shows several images, but only one per question is allowed. Split the row."
        )
    if first.images and not names and not shown:
        raise InputError(f"{where}: the question shows an image, but the row names none. Name it in 'image'.")
    if names and not first.images and any(turn.images for turn in rest):
        raise InputError(
            f"{where}: the image is shown in a later turn, but only the first question is used. Begin the row at "
            "that turn."
        )
    return next(iter([*names, *shown]), None)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _stated_kind(row: Mapping[str, Any], name: str | None, where: str) -> Kind | None:
    """Return the kind that a row's fields say, or ``None``."""
    if "kind" in row:
        kind = next((known for known in KINDS if known == _word(row["kind"]).lower()), None)
        if kind is None:
            raise InputError(f"{where}: kind {row['kind']!r} is unknown; one of {', '.join(KINDS)} is allowed.")
        if (kind == "text") != (name is None):
            has = "no image, which makes it kind text" if name is None else "an image, so its kind is unsafe or safe"
            raise InputError(f"{where}: kind {kind}, but the row has {has}. Correct 'kind', or leave it out.")
        return kind
    if name is None:
        return "text"
    pair = _word(row.get("type")).upper()
    if pair in PAIR_TYPES:
        return "safe" if pair.endswith("S") else "unsafe"
    if "image_safe" not in row:
        return None
    safe = truth(row["image_safe"])
    if safe is None:
        raise InputError(f"{where}: 'image_safe' is {row['image_safe']!r}; true or false is allowed.")
    return "safe" if safe else "unsafe"


def _word(value: Any) -> str:
    return cleaned(str(value))


def _kind_of_answer(answer: str | None, where: str) -> Kind:
    if answer is None:
        raise InputError(
            f"{where}: it is unknown whether this pair should be refused. Give 'kind' (unsafe or safe), HoliSafe's "
            "'type' or 'image_safe', or an answer."
        )
    return "unsafe" if is_refusal(answer) else "safe"
