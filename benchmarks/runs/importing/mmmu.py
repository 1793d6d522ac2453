"""MMMU's rules for parsed answers, as its evaluation states them (github.com/MMMU-Benchmark/MMMU, eval/eval_utils.py).

A multiple-choice answer is right when it is the gold letter. An open answer was parsed into candidates, phrases and
numbers: a number is right when it equals a gold number, both rounded to two decimals; a phrase when a gold phrase is in
it. A gold of one letter must stand beside a blank. A gold number is never looked for in a phrase.

lmms-eval has logged ``parsed_pred`` in three forms: the letter or the list of candidates itself; one of these a
response, in a list; and, for a while, only the first candidate of each response as a text, which its own scoring then
compared letter by letter. Several golds are logged as a list, or as a list written as text, which its own scoring takes
for one phrase.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["figure_of_log", "is_mmmu", "is_multiple_choice", "score"]


def is_mmmu(value: Any) -> bool:
    """Say whether a metric's value is a parsed answer of MMMU."""
    return isinstance(value, Mapping) and "parsed_pred" in value and "answer" in value


def score(logged: Mapping[str, Any]) -> float:
    """Return 1 when any response is right, otherwise 0."""
    return _score(logged, _listed(logged["answer"]))


def figure_of_log(logged: Mapping[str, Any], *, collapsed: bool) -> float:
    """Return what lmms-eval itself counts. ``collapsed``: the log is of the time when candidates became one text."""
    if is_multiple_choice(logged):
        return score(logged)
    predicted, gold = logged["parsed_pred"], logged["answer"]
    if collapsed and isinstance(predicted, list) and all(isinstance(each, str) for each in predicted):
        return 0.0
    return _score(logged, gold if isinstance(gold, list) else [gold])


def _score(logged: Mapping[str, Any], golds: Sequence[Any]) -> float:
    return float(any(_right(response, golds, letters=is_multiple_choice(logged)) for response in _responses(logged)))


def is_multiple_choice(logged: Mapping[str, Any]) -> bool:
    """Say whether the question has options."""
    return bool(logged.get("question_type", "multiple-choice") == "multiple-choice")


def _responses(logged: Mapping[str, Any]) -> list[Any]:
    """Return what was parsed of each response: a letter, or candidates."""
    predicted = logged["parsed_pred"]
    if not isinstance(predicted, list):
        return [predicted]
    if is_multiple_choice(logged) or any(isinstance(each, list) for each in predicted):
        return predicted
    return [predicted]  # the candidates of one response, or its first one alone


def _right(response: Any, golds: Sequence[Any], *, letters: bool) -> bool:
    if letters:
        return any(str(response) == str(gold) for gold in golds)
    right = [each for gold in golds for each in _normalized(gold)]
    numbers = {each for each in right if isinstance(each, float)}
    phrases = [each for each in right if isinstance(each, str)]
    return any(
        candidate in numbers if isinstance(candidate, float) else any(phrase in candidate for phrase in phrases)
        for candidate in _candidates(response)
    )


def _candidates(response: Any) -> list[str | float]:
    """Return candidates, which were normalized when they were parsed; a number may have become text since."""
    found: list[str | float] = []
    for each in response if isinstance(response, list) else [response]:
        if isinstance(each, str) and len(each) == 2 and " " in each:  # a letter beside a blank
            found.append(each)
        else:
            found += _normalized(each)
    return found


def _normalized(value: Any) -> list[str | float]:
    text = str(value).strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _listed(answer: Any) -> list[Any]:
    """Return the right answers, which are logged as one text, a list, or a list written as text."""
    if isinstance(answer, str) and answer.startswith("["):
        try:
            listed = ast.literal_eval(answer)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [answer]  # a text that only looks like a list
        return listed if listed and all(isinstance(each, str) for each in listed) else [answer]  # [1, 2] is an interval
    return answer if isinstance(answer, list) else [answer]
