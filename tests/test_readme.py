"""The README is one page: what it is, how to begin, where to go on. tests/docs runs it and follows its links."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_short() -> None:
    assert README.count("\n") <= 150


def test_it_says_in_three_sentences_what_this_is() -> None:
    first = README.split("\n\n")[0].partition("\n")[2].replace("SafeQwen2.5", "SafeQwen2_5")
    assert len(re.findall(r"[.!?](?:\s|$)", first)) == 3


def test_it_has_one_image_and_links_every_task() -> None:
    assert len(re.findall(r"!\[", README)) == 1
    for task in ("split", "gate", "compress", "serve", "compare", "device", "tutorial", "faq"):
        assert f"](docs/{task}.md)" in README


def test_make_test_is_what_is_run() -> None:
    assert "make test" in README and "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_both_ways_to_start_a_command_stand_side_by_side() -> None:
    assert "python -m export.trt --model SafeLLaVA-7B\nsafevlm export trt --model SafeLLaVA-7B\n" in README
