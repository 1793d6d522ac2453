"""The tap is declared, detected in source text that is never run, or the family's default; never guessed."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent, indent
from typing import Any

import pytest

from safevlm.checkpoint.families import FAMILIES, GEMMA3, LLAVA
from safevlm.checkpoint.tap import MAX_SOURCE_BYTES, Tap, find_tap
from safevlm.checkpoint.tap_source import find_head_calls
from safevlm.errors import GuardHeadError, InputError

PROJECTOR_CODE = {
    "field of the output": """
        outputs = self.model(input_ids=input_ids, pixel_values=pixel_values)
        pooled = outputs.image_hidden_states.mean(dim=1)
        probs = self.img_safety_head(pooled)
    """,
    "getattr": """
        outputs = super().forward(input_ids)
        states = getattr(outputs, "image_hidden_states", None)
        logits = self.img_safety_head(states.float().mean(1))
    """,
    "projector call": """
        features = self.multi_modal_projector(self.vision_tower(pixel_values).last_hidden_state)
        logits = self.img_safety_head.mlp(features.mean(1))
    """,
    "tuple and condition": """
        pooled, n = self.get_image_features(pixel_values).mean(1), 3
        x = pooled if n > 1 else pooled / 2
        y = self.img_safety_head(features=x)
    """,
}
LANGUAGE_CODE = {
    "last of hidden_states": """
        outputs = self.model(input_ids, output_hidden_states=True)
        hidden_states = outputs.hidden_states
        last = hidden_states[-1]
        mask = input_ids == self.config.image_token_id
        features = []
        for index in range(last.shape[0]):
            features.append(last[index][mask[index]].mean(dim=0))
        logits = self.img_safety_head(torch.stack(features))
    """,
    "item 0 of the output": """
        inputs_embeds = inputs_embeds.masked_scatter(image_mask, self.visual(pixel_values))
        outputs = self.model(inputs_embeds=inputs_embeds)
        hidden_states = outputs[0]
        image_mask, _ = self.placeholder_mask(image_features=self.visual(pixel_values))
        pooled = (hidden_states * image_mask.unsqueeze(-1)).sum(1) / image_mask.sum(1)
        logits = self.img_safety_head(pooled)
    """,
    "last_hidden_state": """
        image_features = self.language_model(x).last_hidden_state[mask]
        logits = self.img_safety_head(image_features.mean(0))
    """,
    "key of the output": """
        out = self.language_model(x, return_dict=True)
        logits = self.img_safety_head(out["hidden_states"][-1][:, 5:581].mean(1))
    """,
}
UNCLEAR_CODE = {
    "either": """
        out = self.model(x)
        if self.early:
            pooled = out.image_hidden_states
        else:
            pooled = out.last_hidden_state
        logits = self.img_safety_head(pooled)
    """,
    "a middle layer": """
        logits = self.img_safety_head(self.model(x).hidden_states[-2])
    """,
    "two items of one tuple": """
        states = self.model(x).hidden_states
        logits = self.img_safety_head(states[-1] + states[0])
    """,
    "the raw vision tower": """
        vision_outputs = self.vision_tower(pixels)
        logits = self.img_safety_head(vision_outputs.last_hidden_state)
    """,
    "the raw vision tower, from elsewhere": """
        logits = self.img_safety_head(kwargs.vision_outputs.last_hidden_state)
    """,
    "an unknown function": """
        logits = self.img_safety_head(self.mystery(x))
    """,
    "an attribute": """
        logits = self.img_safety_head(self.cached)
    """,
    "nothing": """
        logits = self.img_safety_head()
    """,
    "itself": """
        x = x + 1
        logits = self.img_safety_head(x)
    """,
}


def module(body: str) -> str:
    method = "    def forward(self, input_ids=None, pixel_values=None, **kwargs):\n"
    return "import torch\n\nclass Model(Base):\n" + method + indent(dedent(body), " " * 8)


@pytest.mark.parametrize("body", PROJECTOR_CODE.values(), ids=PROJECTOR_CODE)
def test_code_that_feeds_the_projector_output_is_recognised(body: str) -> None:
    assert [call.source for call in find_head_calls(module(body))] == ["projector"]


@pytest.mark.parametrize("body", LANGUAGE_CODE.values(), ids=LANGUAGE_CODE)
def test_code_that_feeds_the_last_hidden_state_is_recognised(body: str) -> None:
    assert [call.source for call in find_head_calls(module(body))] == ["language_model"]


@pytest.mark.parametrize("body", UNCLEAR_CODE.values(), ids=UNCLEAR_CODE)
def test_code_that_cannot_be_followed_or_mixes_decides_nothing(body: str, tmp_path: Path) -> None:
    assert [call.source for call in find_head_calls(module(body))] == [None]
    (tmp_path / "modeling.py").write_text(module(body))
    for family in FAMILIES.values():
        tap = find_tap(family, {}, tmp_path)
        assert (tap.source, tap.learned) == (family.default_tap, "default")
        assert "modeling.py:" in tap.evidence
        assert "unclear" in tap.evidence


def test_a_parameter_is_followed_into_its_callers() -> None:
    source = dedent("""
        class Model:
            def judge(self, states, scale=1.0):
                return self.img_safety_head(states.mean(1) * scale)

            def forward(self, x):
                out = self.model(x)
                return self.judge(out.{}, scale=2.0)
    """)
    assert [c.source for c in find_head_calls(source.format("image_hidden_states"))] == ["projector"]
    assert [c.source for c in find_head_calls(source.format("last_hidden_state"))] == ["language_model"]


@pytest.mark.parametrize(("codes", "source"), [(PROJECTOR_CODE, "projector"), (LANGUAGE_CODE, "language_model")])
def test_detection_overrides_the_default_and_says_where(codes: dict[str, str], source: str, tmp_path: Path) -> None:
    text = module(next(iter(codes.values())))
    (tmp_path / "modeling_safe.py").write_text(text)
    line = next(at for at, row in enumerate(text.splitlines(), 1) if "img_safety_head" in row)
    for family in FAMILIES.values():
        tap = find_tap(family, {}, tmp_path)
        assert (tap.source, tap.learned) == (source, "detected")
        assert tap.evidence == f"modeling_safe.py:{line} feeds the guard head from the {source.replace('_', ' ')}"


def test_files_that_contradict_each_other_decide_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(module(PROJECTOR_CODE["getattr"]))
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "b.py").write_text(module(LANGUAGE_CODE["last_hidden_state"]))
    tap = find_tap(LLAVA, {}, tmp_path)
    assert (tap.source, tap.learned) == ("language_model", "default")
    assert "contradicts itself (a.py:" in tap.evidence
    assert "package/b.py:" in tap.evidence


def test_the_code_is_never_run(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    text = f"open({str(proof)!r}, 'w')\nraise SystemExit('ran')\n" + module(PROJECTOR_CODE["getattr"])
    (tmp_path / "modeling.py").write_text(text)
    assert find_tap(LLAVA, {}, tmp_path).learned == "detected"
    assert not proof.exists()


@pytest.mark.parametrize(
    "text",
    ["def f(:\n img_safety_head(", "img_safety_head\0", "x = " + "(" * 5000 + " # img_safety_head",
     "def f(x):\n  return img_safety_head(" + "-" * 50_000 + "x)",
     "def f(x):\n  return img_safety_head(x" + ".a" * 20_000 + ")"],
    ids=["syntax", "null byte", "parentheses", "minus signs", "fields"],
)  # fmt: skip
def test_hostile_source_decides_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "hostile.py").write_text(text)
    tap = find_tap(GEMMA3, {}, tmp_path)
    assert (tap.source, tap.learned) == ("projector", "default")
    assert "hostile.py cannot be followed" in tap.evidence


def test_source_entangled_on_purpose_ends_soon(tmp_path: Path) -> None:
    rows = [f"    a{i} = a{i + 1} + a{i + 1} * a{i + 1}" for i in range(60)]
    text = "def f(a60):\n" + "\n".join(rows) + "\n    return img_safety_head(a0)\n"
    (tmp_path / "knot.py").write_text(text)
    assert "knot.py cannot be followed" in find_tap(GEMMA3, {}, tmp_path).evidence


def test_warnings_in_foreign_source_are_not_ours(tmp_path: Path) -> None:
    text = module(PROJECTOR_CODE["getattr"]) + "\nPATTERN = '\\d'\n"
    (tmp_path / "modeling.py").write_text(text)
    assert find_tap(LLAVA, {}, tmp_path).learned == "detected"


def test_too_large_a_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "big.py").write_text(module(PROJECTOR_CODE["getattr"]) + "#" * MAX_SOURCE_BYTES)
    assert find_tap(LLAVA, {}, tmp_path).learned == "default"


def test_the_caller_goes_before_the_config_and_the_config_before_the_code(tmp_path: Path) -> None:
    (tmp_path / "modeling.py").write_text(module(PROJECTOR_CODE["getattr"]))
    config = {"safety_tap": "language_model"}
    assert find_tap(LLAVA, {}, tmp_path).learned == "detected"
    tap = find_tap(GEMMA3, config, tmp_path)
    assert (tap.source, tap.learned) == ("language_model", "declared")
    assert "'safety_tap' in config.json" in tap.evidence
    tap = find_tap(GEMMA3, config, tmp_path, declared="projector")
    assert (tap.source, tap.learned, tap.evidence) == ("projector", "declared", "declared by the caller")


def test_a_config_entry_may_be_an_object(tmp_path: Path) -> None:
    tap = find_tap(GEMMA3, {"safety_tap": {"source": "projector", "pooling": "mean"}}, tmp_path)
    assert (tap.source, tap.pooling, tap.tokens, tap.learned) == ("projector", "mean", "image", "declared")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("projektor", "source 'projektor'. Allowed: projector, language_model"),
        ({"source": "projector", "pooling": "max"}, "pooling 'max'. Allowed: mean"),
        ({"source": "projector", "tokens": "all"}, "tokens 'all'. Allowed: image"),
        ({"source": ["projector"]}, "source"),
        ({"pooling": "mean"}, "an object with 'source'"),
        ({"source": "projector", "poolling": "mean"}, "an object with 'source'"),
        (3, "'safety_tap' is 3"),
    ],
)
def test_a_config_entry_that_is_no_tap_is_refused(entry: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(GuardHeadError, match=message):
        find_tap(GEMMA3, {"safety_tap": entry}, tmp_path)


def test_a_typo_of_the_caller_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tap 'vision' does not exist; allowed: projector, language_model"):
        find_tap(GEMMA3, {}, tmp_path, declared="vision")  # type: ignore[arg-type]


def test_without_code_the_default_says_so(tmp_path: Path) -> None:
    assert find_tap(GEMMA3, {}, tmp_path) == Tap(
        source="projector",
        learned="default",
        evidence="the default of SafeGem: config.json has no 'safety_tap', and no Python file of the checkpoint "
        "calls its guard head",
    )
