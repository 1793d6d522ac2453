"""Shares of kinds are kept, the choice is that of the seed, and the hash is that of the content."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from calibration.sets.conversations import built_in_conversations
from calibration.sets.mix import Mix, choose, read_mix, samples_sha256
from safevlm.errors import InputError


def test_shares_are_kept_and_the_seed_decides() -> None:
    source = built_in_conversations()
    mix = Mix(samples=50, shares=read_mix("unsafe=3, safe=1,text=1"), seed=4)
    chosen = choose(source, mix)
    assert Counter(sample.kind for sample in chosen) == {"unsafe": 30, "safe": 10, "text": 10}
    assert chosen == choose(source, mix)
    assert chosen != choose(source, replace(mix, seed=5))
    assert len({sample.where for sample in chosen}) == 50
    for samples in (1, 2, 7, 128):
        assert sum(Mix(samples=samples).counts().values()) == samples


def test_the_hash_changes_with_every_part_of_the_content() -> None:
    first, second, text = choose(built_in_conversations(), Mix(samples=3, shares=read_mix("safe=2,text=1")))
    hashes = {
        samples_sha256([first], ["Yes."]),
        samples_sha256([first], ["No."]),
        samples_sha256([first], [None]),
        samples_sha256([replace(first, question="Why?")], ["Yes."]),
        samples_sha256([replace(first, image=second.image)], ["Yes."]),
        samples_sha256([first, text], ["Yes.", None]),
    }
    assert len(hashes) == 6
    assert samples_sha256([replace(first, where="elsewhere")], ["Yes."]) in hashes


@pytest.mark.parametrize("text", ["unsafe", "unsafe=x", "harm=1", "safe=-1", "safe=nan", "safe=1,safe=1", "safe=inf"])
def test_bad_shares_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--mix"):
        read_mix(text)


def test_too_few_samples_are_counted() -> None:
    with pytest.raises(InputError, match=r"5000 samples of kind text are needed, but it has \d+"):
        choose(built_in_conversations(), Mix(samples=5000, shares={"text": 1.0}))
    with pytest.raises(InputError, match="--samples 0"):
        Mix(samples=0)
    with pytest.raises(InputError, match="--mix"):
        Mix(shares={"safe": 0.0})
