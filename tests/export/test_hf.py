"""A checkpoint of any layout becomes one that transformers opens by itself, with the same answers and guard."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from export.hf import export_hf, main
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.checkpoint.weights.quantized import Quantization
from safevlm.checkpoint.weights.shards import GUARD_FILE
from safevlm.errors import CheckpointError, InputError, PrecisionError
from safevlm.network.loading import load_safe_vlm
from safevlm.network.prompt_tokens import IMAGE
from tests.safevlm.checkpoint.random_checkpoints import LAYOUTS, QUESTIONS, SIZE, write_checkpoint

TINY = ("tiny-safellava", "tiny-safeqwen", "tiny-safegem")


def loaded(folder: Path, family: str) -> Any:
    return load_safe_vlm(open_checkpoint(folder), grid=SIZE[family] if family == "qwen2_5_vl" else None)


@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_every_layout_keeps_its_answers_and_its_guard(family: str, layout: str, tmp_path: Path) -> None:
    written = write_checkpoint(family, layout, tmp_path / "source")
    tensors = load_file(written.folder / "model.safetensors")  # 16 bit, so that nothing is rounded
    halves = {f"base_model.model.{name}": tensor.half() for name, tensor in tensors.items()}  # as PEFT merges
    save_file(halves, written.folder / "model.safetensors")
    out = export_hf(open_checkpoint(written.folder), tmp_path / "out", shard_bytes=100_000).out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"], "nothing else is left"
    assert (out / "model.safetensors.index.json").is_file()
    assert set(load_file(out / GUARD_FILE)) == {f"img_safety_head.mlp.{at}.{kind}" for at in (0, 3) for kind in KINDS}
    assert "auto_map" not in json.loads((out / "config.json").read_text()), "nobody's code is asked for"
    before, after = loaded(written.folder, family), loaded(out, family)
    for question in QUESTIONS:
        if layout != "original":
            assert before.prompt_ids(question) == after.prompt_ids(question)
    images = written.images(2)
    torch.testing.assert_close(after.guard(images)[0], before.guard(images)[0], rtol=0, atol=1e-6)
    if layout != "original":  # whose small tokenizer marks only the first word of a text
        answers = [[answer.text for answer in vlm.answer(images, QUESTIONS[:2], 8)] for vlm in (before, after)]
        assert answers[0] == answers[1]


KINDS = ("weight", "bias")


@pytest.mark.parametrize("model", TINY)
def test_transformers_opens_it_and_answers_the_same(model: str, tmp_path: Path) -> None:
    source = open_checkpoint(model)
    out = export_hf(source, tmp_path / "out").out
    whole = load_safe_vlm(source)
    size = whole.preprocessing
    images = torch.randint(0, 256, (1, size.height, size.width, 3), dtype=torch.uint8)
    theirs: Any = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
    assert theirs.generation_config.eos_token_id is not None
    tokenizer: Any = AutoTokenizer.from_pretrained(out)
    image_id = tokenizer.convert_tokens_to_ids(source.family.chat.image_token)
    assert theirs.config.image_token_id == image_id
    ids = torch.tensor([[image_id if each == IMAGE else each for each in whole.prompt_ids("What is drawn?")]])
    kinds = {"gemma3": "token_type_ids", "qwen2_5_vl": "mm_token_type_ids"}
    extra: dict[str, Any] = {}
    if source.family.key in kinds:
        extra[kinds[source.family.key]] = (ids == image_id).int()
    with torch.no_grad():
        found = theirs.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            **processed(model, images),
            **extra,
        )
    text = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert text == whole.answer(images, ["What is drawn?"], 12)[0].text


def processed(model: str, images: torch.Tensor) -> dict[str, Any]:
    """Return what transformers' image processor, by the settings that were written, makes of images at size."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    classes: dict[str, Any] = {
        "tiny-safellava": CLIPImageProcessorPil,
        "tiny-safeqwen": Qwen2VLImageProcessorPil,
        "tiny-safegem": Gemma3ImageProcessorPil,
    }
    settings = {key: value for key, value in open_checkpoint(model).processor.items() if value is not None}
    found = classes[model](**settings)([np.asarray(image) for image in images], return_tensors="pt")
    return {key: value for key, value in found.items() if key in ("pixel_values", "image_grid_thw")}


def test_what_cannot_be_written_is_said_before_anything_is(tmp_path: Path) -> None:
    source = open_checkpoint("tiny-safegem")
    out = export_hf(source, tmp_path / "out").out
    with pytest.raises(InputError, match="already exists"):
        export_hf(source, out)
    quantized = replace(source, quantization=Quantization(method="gptq", format="gptq"))
    with pytest.raises(InputError, match=r"is quantized \(gptq\).*Give the 16-bit checkpoint"):
        export_hf(quantized, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("value", "error", "message"), [(float("nan"), CheckpointError, "NaN"), (1e6, PrecisionError, "beyond float16")]
)
def test_values_that_are_none_leave_nothing_behind(
    value: float, error: type[Exception], message: str, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(open_checkpoint("tiny-safellava").folder, source)
    tensors = load_file(source / "model.safetensors")
    wide = tensors["lm_head.weight"].float()
    wide[3, 3] = value
    save_file({**tensors, "lm_head.weight": wide}, source / "model.safetensors")
    with pytest.raises(error, match=message):
        export_hf(open_checkpoint(source), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_command_says_what_it_wrote_and_what_comes_next(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(main, ["--model", "tiny-safeqwen", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "tiny-safeqwen in 16 bit" in done.output and GUARD_FILE in done.output and "vllm serve" in done.output
    done = CliRunner().invoke(main, ["--model", "tiny-safeqwen", "--out", str(tmp_path / "other"), "--json"])
    found = json.loads(done.output)
    assert found["guard"] == GUARD_FILE and found["bytes"] > 7e6 and not found["random_weights"]
