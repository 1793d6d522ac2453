"""What both runners say of a question before any work, and of an answer once it is written: the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.checkpoint import open_checkpoint
from models.errors import QuestionError
from models.text_stream import TextStream
from runtimes.gate import Gate
from runtimes.language import LanguageRunner
from runtimes.llamacpp_language import LlamaCppLanguageRunner
from runtimes.policy import Limits, Policy
from runtimes.torch_language import TorchLanguageRunner
from runtimes.writing import Decoding, Writing

QUESTION = "Where is the square?"
NAMES = ("tiny-safellava", "tiny-safegem", "tiny-safeqwen")
Pair = tuple[LanguageRunner, LanguageRunner]


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest, gguf_folder: Callable[[str], Path]) -> Iterator[Pair]:
    with ExitStack() as held:
        torch = held.enter_context(TorchLanguageRunner(open_checkpoint(request.param)))
        yield torch, held.enter_context(LlamaCppLanguageRunner(gguf_folder(request.param)))


def again(pair: Pair) -> Pair:
    """Runners of the same models for a gate, which enters and leaves them."""
    torch, llama = pair
    assert isinstance(torch, TorchLanguageRunner) and isinstance(llama, LlamaCppLanguageRunner)
    return TorchLanguageRunner(torch.model), LlamaCppLanguageRunner(llama.artifact)


def noise(runner: LanguageRunner) -> Any:
    size = runner.preprocessing
    assert size is not None
    return np.random.default_rng(1).integers(0, 256, (size.height, size.width, 3), dtype=np.uint8)


def written(runner: LanguageRunner, most: int, **decoding: Any) -> tuple[str, Writing, int]:
    prefilled = runner.prefill(noise(runner), QUESTION)
    writing = Writing(Decoding(**decoding))
    return "".join(runner.stream(prefilled.handle, most, writing)), writing, prefilled.tokens


def refusal(runner: LanguageRunner, question: str, most: int | None = None) -> tuple[str, str]:
    with pytest.raises(QuestionError) as raised:
        runner.check_question(question, most)
    return raised.value.code, str(raised.value)


def test_bad_questions_are_refused_alike_before_the_model_runs(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    for runner in pair:
        monkeypatch.setattr(runner, "_prefill", None)
    prompt = pair[0]._reader().prompt  # type: ignore[union-attr]
    bad = ["", " \n\t", "\u200b\u2060", "\ud83d", "why \udfff?", f"a{prompt.image_token}b", prompt.end_of_turn]
    for question in bad:
        one, other = (refusal(runner, question) for runner in pair)
        assert one == other and one[0] == "invalid_value", question
    for question, most in (("why " * 40_000, None), ("x" * 50_000_000, None), (QUESTION, 40_000)):
        one, other = (refusal(runner, question, most) for runner in pair)
        assert one[0] == other[0] == "context_length_exceeded" and one[1].split(";")[0] == other[1].split(";")[0]
    for runner in pair:
        runner.check_question("Is <b>this</b> | half: 1 < 2 > 0, \u00e9\U0001f600?", 8)


def test_the_gate_raises_and_judges_nothing(pair: Pair) -> None:
    with Gate(None, again(pair)[0]) as gate, pytest.raises(QuestionError, match="empty"):
        gate.ask(b"no image at all", " ")


def test_what_fits_the_context_is_answered_and_one_token_more_is_not(pair: Pair) -> None:
    for runner in pair:
        reader = runner._reader()
        assert reader is not None
        tokens = runner.prefill(noise(runner), QUESTION).tokens
        runner.check_question(QUESTION, reader.context - tokens)
        assert refusal(runner, QUESTION, reader.context - tokens + 1)[0] == "context_length_exceeded"


def test_runners_agree_on_usage_and_on_why_it_ended(pair: Pair) -> None:
    for most in (1, 4, 200):
        (text, one, prompt), (same, other, also) = (written(runner, most) for runner in pair)
        assert (text, prompt, one.tokens, one.finish_reason) == (same, also, other.tokens, other.finish_reason)
        assert one.tokens <= most and (one.finish_reason == "stop" or one.tokens == most)
    assert written(pair[0], 1)[1].finish_reason == "length"


def test_a_seed_says_what_is_sampled(pair: Pair) -> None:
    for runner in pair:
        greedy = written(runner, 16)[0]
        drawn = [written(runner, 16, temperature=2.0, seed=seed)[0] for seed in (1, 1, 2, 3, 4)]
        assert drawn[0] == drawn[1] and len(set(drawn)) > 1
        assert written(runner, 16, temperature=2.0, top_p=0.0, seed=1)[0] == greedy


def test_a_stop_text_is_never_in_an_answer(pair: Pair) -> None:
    for runner in pair:
        whole = written(runner, 24)[0]
        for stop in (whole[3:5], whole[1:2], whole[-2:]):
            text, writing, _ = written(runner, 24, stop=(stop,))
            assert text == whole[: whole.find(stop)].rstrip() and writing.finish_reason == "stop"


def test_who_is_gone_gets_no_further_token(pair: Pair) -> None:
    from PIL import Image

    limits = Limits.model_construct(block=2.0, allow=2.0)
    for runner in again(pair):
        asked: list[int] = []

        def gone(asked: list[int] = asked) -> bool:
            asked.append(1)
            return len(asked) > 4

        with Gate(None, runner, Policy(exact=limits)) as gate:
            result = gate.ask(Image.fromarray(noise(runner)), QUESTION, gone=gone, max_new_tokens=100)
            assert result.error_in == "generate" and len(asked) == 5
            after = gate.ask(Image.fromarray(noise(runner)), QUESTION, max_new_tokens=2)
            assert after.answer is not None and (after.finish_reason, after.completion_tokens) == ("length", 2)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    st.text("ab\u00e9 \n", max_size=30), st.lists(st.text("ab\u00e9 \n", min_size=1, max_size=4), max_size=4), st.data()
)
def test_stops_in_pieces_are_the_stops_of_the_whole(text: str, stops: list[str], data: st.DataObject) -> None:
    """Tokens of any number of bytes, characters split over them included."""
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)), max_size=12)) | {0, len(raw)})
    pieces = [raw[start:end] for start, end in pairwise(cuts)]
    stream = TextStream(lambda ids: b"".join(pieces[at] for at in ids).decode("utf-8", "replace"), stops)
    told = ""
    for at in range(len(pieces)):
        told += stream.add(at)
        if stream.stopped:
            break
    else:
        told += stream.end()
    shown = text.lstrip()
    ends = [(shown.find(stop) + len(stop), shown.find(stop)) for stop in stops if stop in shown]
    assert told == (shown[: min(ends)[1]] if ends else shown).rstrip()
    assert stream.stopped == bool(ends) and not any(stop in told for stop in stops)
