"""Image settings are found where the family's own code looks for them, or refused by name."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.checkpoint.configs.processor_config import read_processor
from safevlm.contract.preprocessing import Preprocessing
from safevlm.errors import CheckpointError, InputError
from tests.safevlm.checkpoint.folders import CONFIG, WIDTH, write_folder, write_json
from tests.safevlm.contract.test_preprocessing import assert_equal, photograph

SIDE = 56
TEXT = {"hidden_size": WIDTH, "num_attention_heads": 2, "num_key_value_heads": 2}
STOCK = {"llava": "new transformers LLaVA", "qwen2_5_vl": "new Qwen", "gemma3": "new Gemma"}
"""The family's layout in transformers."""
LOADABLE = {
    "llava": {"model_type": "llava"},
    "qwen2_5_vl": {"model_type": "qwen2_5_vl"},
    "gemma3": {"model_type": "gemma3"},
}
IMAGES = [photograph(size) for size in ((150, 61), (50, 97), (40, 33))]
ORIGINAL = {"model_type": "llava_llama", "mm_vision_tower": "clip", "hidden_size": WIDTH}
CROP = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}


def folder_of(root: Path, family: str, config: dict[str, Any], **files: dict[str, Any] | None) -> Path:
    layout = "original LLaVA" if config.get("model_type") == "llava_llama" else STOCK[family]
    folder = write_folder(root / "model", layout, config={**CONFIG, "text_config": TEXT, **config})
    for name, content in files.items():
        if content is not None:
            write_json(folder / f"{name}.json", content)
    return folder


def contract_of(folder: Path, **grid: Any) -> Preprocessing:
    checkpoint = open_checkpoint(folder)
    return read_processor(checkpoint.processor, family=checkpoint.family.key, **grid)


# -- placements against the library's own processor -------------------------------------------------------

SIZES = st.sampled_from(
    [SIDE, [SIDE, SIDE], {"shortest_edge": SIDE}, {"height": SIDE, "width": SIDE}, {"height": 28, "width": SIDE},
     {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}, {"shortest_edge": SIDE, "longest_edge": 70}, None]
)  # fmt: skip
SETTINGS: dict[str, st.SearchStrategy[Any]] = {
    "size": SIZES,
    "crop_size": st.sampled_from([SIDE, {"height": SIDE, "width": SIDE}, {"height": 28, "width": 42}, [42, 28], None]),
    "do_center_crop": st.sampled_from([True, False, None]),
    "default_to_square": st.booleans(),
    "do_pad": st.sampled_from([True, True, False, None]),
    "resample": st.sampled_from([0, 2, 3, None]),
    "image_mean": st.sampled_from([[0.5, 0.5, 0.5], 0.4, None]),
    "image_std": st.sampled_from([[0.5, 0.25, 0.5], None]),
    "rescale_factor": st.sampled_from([1 / 255, 1 / 127.5]),
    "do_resize": st.sampled_from([True, True, True, False]),
    "do_convert_rgb": st.sampled_from([True, None]),
    "do_pan_and_scan": st.sampled_from([False, None]),
    "min_pixels": st.sampled_from([28 * 28, 100 * 100, None]),
    "max_pixels": st.sampled_from([112 * 112, 56 * 56, None]),
    "image_aspect_ratio": st.sampled_from(["pad", "square"]),
}
KINDS = {
    "llava": ["CLIPImageProcessor", "LlavaImageProcessor", "LlavaImageProcessorFast", "SiglipImageProcessor"],
    "qwen2_5_vl": ["Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast"],
    "gemma3": ["Gemma3ImageProcessor", "SiglipImageProcessor"],
}


@st.composite
def stated(draw: st.DrawFn, family: str) -> dict[str, Any]:
    """Return what one file states of an image processor: a class or none, and some of the settings."""
    keys = draw(st.lists(st.sampled_from(sorted(SETTINGS)), unique=True, max_size=6))
    found = {key: draw(SETTINGS[key]) for key in keys}
    if family != "qwen2_5_vl" and "size" not in found and draw(st.booleans()):
        found["size"] = {"height": SIDE, "width": SIDE}
    kind = draw(st.sampled_from([*KINDS[family], None]))
    return {"image_processor_type": kind, **found} if kind else found


@st.composite
def placements(draw: st.DrawFn) -> tuple[str, dict[str, Any], dict[str, dict[str, Any] | None]]:
    family = draw(st.sampled_from(sorted(STOCK)))
    config = dict(ORIGINAL if family == "llava" and draw(st.booleans()) else LOADABLE[family])
    ratio = draw(st.sampled_from([None, "pad", "square"]))
    if ratio is not None:
        config["image_aspect_ratio"] = ratio
    nested = draw(st.none() | stated(family))
    return (
        family,
        config,
        {
            "preprocessor_config": draw(st.none() | stated(family)),
            "processor_config": draw(st.sampled_from([None, {"processor_class": "P"}, {"image_processor": nested}])),
        },
    )


def own_processor(folder: Path, config: dict[str, Any]) -> Any:
    """Return transformers' processor of a folder; LLaVA's code asks for CLIP's where no file names a class."""
    auto: Any = AutoImageProcessor  # untyped
    try:
        return auto.from_pretrained(folder, backend="pil")
    except ValueError:  # a model type that transformers does not know
        if config["model_type"] != ORIGINAL["model_type"]:
            raise
        return CLIPImageProcessorPil.from_pretrained(folder)


def own_input(image: Image.Image, config: dict[str, Any], processor: Any) -> Image.Image:
    """Return what the processor is given: LLaVA's code first completes the image to a square, if its config says so."""
    if config["model_type"] != ORIGINAL["model_type"] or config.get("image_aspect_ratio") != "pad":
        return image
    mean = processor.image_mean
    colour = tuple(int(255 * value) for value in (mean if isinstance(mean, (list, tuple)) else [mean] * 3))
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def test_random_placements_give_the_librarys_own_pixels_or_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: Counter[str] = Counter()

    @settings(max_examples=400, deadline=None, derandomize=True)
    @given(placements())
    def compare(placed: tuple[str, dict[str, Any], dict[str, dict[str, Any] | None]]) -> None:
        family, config, files = placed
        # transformers' class writes min_pixels into its own default
        monkeypatch.setattr(
            Qwen2VLImageProcessorPil, "size", {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
        )
        with tempfile.TemporaryDirectory() as root:
            folder = folder_of(Path(root), family, config, **files)
            try:
                contract = contract_of(folder)
            except InputError:
                counts["refused"] += 1
                return
            try:
                processor = own_processor(folder, config)
                wanted = [processor(own_input(image, config, processor), return_tensors="np") for image in IMAGES]
            except (OSError, ValueError, KeyError, TypeError):
                counts["not read by its own library"] += 1
                return
            for image, encoded in zip(IMAGES, wanted, strict=True):
                compare_one(folder, contract, image, encoded, processor)
            counts[family] += 1

    compare()
    assert all(counts[family] >= 20 for family in STOCK), counts


def compare_one(folder: Path, contract: Preprocessing, image: Image.Image, encoded: Any, processor: Any) -> None:
    values = np.asarray(encoded["pixel_values"])
    if "image_grid_thw" not in encoded:
        assert values.shape[2:] == (contract.height, contract.width)
        return assert_equal(contract, image, values[0])
    patch, (_, rows, columns) = processor.patch_size, (int(side) for side in encoded["image_grid_thw"][0])
    contract = contract_of(folder, grid=(rows * patch, columns * patch))
    patches = values.reshape(rows // 2, columns // 2, 2, 2, 3, 2, patch, patch)[..., 0, :, :]
    assert_equal(contract, image, patches.transpose(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * patch, columns * patch))
    return None


# -- single cases -----------------------------------------------------------------------------------------

WORLD = Path(__file__).parents[3] / "fixtures" / "world" / "checkpoints"


@pytest.mark.parametrize("stated", [None, {"image_processor_type": "CLIPImageProcessor", **CROP}])
def test_an_original_llava_config_pads_whatever_lies_beside_it(stated: dict[str, Any] | None, tmp_path: Path) -> None:
    config = json.loads((WORLD / "llava_config.json").read_text())
    folder = write_folder(tmp_path, "original LLaVA", config=config)
    if stated is not None:
        write_json(folder / "preprocessor_config.json", stated)
    contract = contract_of(folder)
    assert (contract.fit, contract.height) == ("pad", SIDE if stated else 336)
    write_json(folder / "config.json", {**config, "image_aspect_ratio": "square"})
    assert contract_of(folder).fit == "crop"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio = 'anyres', which gives the image another shape"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end = True, which puts <im_start>"),
        ({"s2": True}, "s2 = True, which reads the image at several scales"),
        ({"mm_resampler_type": "spatial_pool"}, "mm_resampler_type = 'spatial_pool'"),
        ({"text_config": {**TEXT, "image_aspect_ratio": "pad"}}, "text_config states image_aspect_ratio = 'pad'"),
    ],
)
def test_what_llavas_code_does_and_is_not_followed_is_refused(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder_of(tmp_path, "llava", {**ORIGINAL, **config}))


def test_a_ratio_that_transformers_would_not_read_is_refused(tmp_path: Path) -> None:
    clip = {"image_processor_type": "CLIPImageProcessor", **CROP}
    config = {**LOADABLE["llava"], "image_aspect_ratio": "pad"}
    with pytest.raises(CheckpointError, match=r"'pad', but the CLIPImageProcessor .* do_pad = False"):
        open_checkpoint(folder_of(tmp_path / "a", "llava", config, preprocessor_config=clip))
    padding = {"image_processor_type": "LlavaImageProcessor", **CROP, "do_pad": True}
    assert contract_of(folder_of(tmp_path / "b", "llava", config, preprocessor_config=padding)).fit == "pad"
    beside = {**clip, "image_aspect_ratio": "pad"}
    with pytest.raises(CheckpointError, match=r"preprocessor_config.json: .* = 'pad', but it is read from"):
        open_checkpoint(folder_of(tmp_path / "c", "llava", ORIGINAL, preprocessor_config=beside))


@pytest.mark.parametrize(
    ("family", "config", "processor"),
    [
        ("llava", {"vision_feature_select_strategy": "full"}, {"vision_feature_select_strategy": "default"}),
        ("llava", {"vision_config": {"patch_size": 14}}, {"patch_size": 16}),
        ("gemma3", {"mm_tokens_per_image": 4}, {"image_seq_length": 256}),
    ],
)
def test_a_processor_that_counts_other_tokens_is_refused(
    family: str, config: dict[str, Any], processor: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="Both count an image's tokens and must agree"):
        open_checkpoint(folder_of(tmp_path, family, {**LOADABLE[family], **config}, processor_config=processor))


@pytest.mark.parametrize("section", [3, "text", [1]])
def test_a_processor_that_is_no_object_is_refused(section: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'image_processor' is .* an object is allowed"):
        open_checkpoint(folder_of(tmp_path, "gemma3", {}, processor_config={"image_processor": section}))
