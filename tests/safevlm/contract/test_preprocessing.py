"""The contract equals the Hugging Face image processors to one grey level, and refuses what it cannot say."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter
from pydantic import ValidationError

from safevlm.checkpoint.configs.processor_config import read_processor
from safevlm.checkpoint.families import FAMILIES
from safevlm.contract.preprocessing import Preprocessing
from safevlm.errors import InputError

SIZES = [(640, 481), (97, 301), (301, 97), (335, 333), (21, 30), (336, 336), (511, 767)]
"""(width, height): odd, upright, flat, near the target, smaller and larger."""
CLIP = FAMILIES["llava"].preprocessing
GEMMA = FAMILIES["gemma3"].preprocessing
QWEN = FAMILIES["qwen2_5_vl"].preprocessing
PROCESSORS = {
    "clip": ("clip", "CLIPImageProcessorPil"),
    "llava": ("llava", "LlavaImageProcessorPil"),
    "gemma": ("gemma3", "Gemma3ImageProcessorPil"),
    "qwen": ("qwen2_vl", "Qwen2VLImageProcessorPil"),
}


def photograph(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Return smooth colour with grain, clipped at both ends as a photograph is."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    grain = rng.normal(0, 12, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.asarray(coarse) * 1.3 - 30 + grain, 0, 255).astype(np.uint8))


def drawing(size: tuple[int, int]) -> Image.Image:
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    width, height = size
    draw.ellipse((width * 0.1, height * 0.1, width * 0.7, height * 0.6), fill="red", outline="black")
    draw.polygon([(0, height - 1), (width / 2, height / 3), (width - 1, height - 1)], fill="blue")
    draw.line((0, 0, width, height), fill="black", width=1)
    return image.filter(ImageFilter.SHARPEN)


def without_type(settings: dict[str, object], **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in {**settings, **changes}.items() if key != "image_processor_type"}


def processed(name: str, settings: dict[str, Any]) -> Any:
    """Return transformers' own processor; imported here because it takes seconds."""
    package, processor = PROCESSORS[name]
    module = import_module(f"transformers.models.{package}.image_processing_pil_{package}")
    return getattr(module, processor)(**settings)


def grey_levels(values: np.ndarray[Any, Any], contract: Preprocessing) -> np.ndarray[Any, Any]:
    """Undo the normalisation of 3 x H x W values: H x W x 3 in 0..255."""
    scaled = values.transpose(1, 2, 0) * np.array(contract.std) + np.array(contract.mean)
    return np.asarray(scaled / contract.rescale)


def assert_equal(contract: Preprocessing, image: Image.Image, values: np.ndarray[Any, Any]) -> None:
    mine = contract.apply(image)
    assert mine.shape == (contract.height, contract.width, 3) and mine.dtype == np.uint8
    assert np.abs(mine - grey_levels(values, contract)).max() <= 1.001
    assert np.abs(contract.normalise(mine[None])[0] - values).max() <= 1.01 / 255 / min(contract.std)


@pytest.mark.parametrize("draw", [photograph, drawing])
@pytest.mark.parametrize(
    ("name", "family", "stated", "settings"),
    [
        ("clip", "llava", CLIP, without_type(CLIP)),
        (
            "clip",
            "llava",
            {**CLIP, "size": 96, "crop_size": {"height": 120, "width": 80}},
            without_type(CLIP, size={"shortest_edge": 96}, crop_size={"height": 120, "width": 80}),
        ),
        ("clip", "llava", {"image_processor_type": "CLIPImageProcessor"}, {}),
        ("llava", "llava", {**CLIP, "image_aspect_ratio": "pad"}, without_type(CLIP, do_pad=True)),
        ("gemma", "gemma3", GEMMA, without_type(GEMMA)),
        ("gemma", "gemma3", {"image_processor_type": "Gemma3ImageProcessorFast"}, {}),
    ],
    ids=["clip", "clip-beyond", "clip-defaults", "llava-pad", "gemma", "gemma-defaults"],
)
def test_equal_to_the_hugging_face_processor(
    draw: Any, name: str, family: str, stated: dict[str, Any], settings: dict[str, Any]
) -> None:
    contract = read_processor(stated, family=family)
    processor = processed(name, settings)
    for size in SIZES:
        image = draw(size)
        values = np.asarray(processor(image, return_tensors="np")["pixel_values"])[0]
        assert_equal(contract, image, values)


@pytest.mark.parametrize("size", [(640, 481), (97, 301), (301, 97), (1001, 750)])
def test_equal_to_qwens_processor_at_the_grid_it_chooses(size: tuple[int, int]) -> None:
    image = photograph(size)
    settings = without_type(QWEN)
    encoded = processed("qwen", settings)(image, return_tensors="np")
    _, rows, columns = (int(side) for side in encoded["image_grid_thw"][0])
    contract = read_processor(QWEN, family="qwen2_5_vl", grid=(rows * 14, columns * 14))
    patches = np.asarray(encoded["pixel_values"]).reshape(rows // 2, columns // 2, 2, 2, 3, 2, 14, 14)[..., 0, :, :]
    values = patches.transpose(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * 14, columns * 14)
    assert_equal(contract, image, values)


def test_qwen_at_a_fixed_grid_is_a_plain_resize() -> None:
    contract = read_processor(QWEN, family="qwen2_5_vl", grid=(112, 224))
    image = photograph((301, 97))
    assert np.array_equal(contract.apply(image), np.asarray(image.resize((224, 112), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize(
    ("limits", "side"),
    [
        ({}, 448),
        ({"min_pixels": 112 * 112, "max_pixels": 112 * 112}, 112),
        ({"min_pixels": None, "max_pixels": 200 * 200}, 196),
        ({"min_pixels": 500 * 500}, 504),
        ({"patch_size": 16}, 448),
    ],
)
def test_qwens_default_grid_respects_the_processors_limits(limits: dict[str, Any], side: int) -> None:
    contract = read_processor({**QWEN, **limits}, family="qwen2_5_vl")
    assert (contract.height, contract.width, contract.fit) == (side, side, "squash")


def test_qwen_reads_both_spellings_of_its_limits() -> None:
    new = {key: value for key, value in QWEN.items() if key not in ("min_pixels", "max_pixels")}
    new["size"] = {"shortest_edge": 3136, "longest_edge": 84 * 84}
    assert read_processor(new, family="qwen2_5_vl").height == 84


@pytest.mark.parametrize("grid", [(450, 448), (0, 28), (28, -28)])
def test_a_grid_between_the_patches_is_refused_with_the_nearest(grid: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=r"multiples of 28 .*The nearest is \d+x\d+"):
        read_processor(QWEN, family="qwen2_5_vl", grid=grid)


def test_the_nearest_grid_is_near() -> None:
    with pytest.raises(InputError, match="nearest is 448x476"):
        read_processor(QWEN, family="qwen2_5_vl", grid=(450, 470))


def test_a_fixed_size_takes_only_its_own_grid() -> None:
    assert read_processor(GEMMA, family="gemma3", grid=(896, 896)).height == 896
    for settings, family in ((GEMMA, "gemma3"), (CLIP, "llava")):
        with pytest.raises(InputError, match="a grid of 448x448 is not possible"):
            read_processor(settings, family=family, grid=(448, 448))


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gemma3", {"do_resize": False}),
        ("gemma3", {"do_rescale": False}),
        ("gemma3", {"do_normalize": False}),
        ("gemma3", {"do_pan_and_scan": True}),
        ("gemma3", {"resample": 17}),
        ("gemma3", {"resample": "cubic"}),
        ("gemma3", {"image_std": [0.5]}),
        ("gemma3", {"image_mean": "grey"}),
        ("gemma3", {"size": {"height": 0, "width": 896}}),
        ("gemma3", {"size": {"longest_edge": 5}}),
        ("gemma3", {"image_std": [0.5, 0.5, 0.0]}),
        ("gemma3", {"do_sharpen": True}),
        ("gemma3", {"image_processor_type": "ViTImageProcessor"}),
        ("llava", {"do_center_crop": False}),
        ("llava", {"crop_size": {"height": 336}}),
        ("llava", {"image_aspect_ratio": "anyres"}),
        ("llava", {"do_pad": True}),
        ("llava", {"image_aspect_ratio": "pad", "size": {"shortest_edge": 400}}),
        ("qwen2_5_vl", {"patch_size": "14"}),
        ("qwen2_5_vl", {"min_pixels": 10_000, "max_pixels": 5_000}),
    ],
)
def test_a_setting_that_cannot_be_kept_is_refused_by_name(family: str, change: dict[str, Any]) -> None:
    stated = {**FAMILIES[family].preprocessing, **change}
    named = "crop_size" if {"image_aspect_ratio", "size"} <= set(change) else next(iter(change))
    with pytest.raises(InputError, match=named.removeprefix("image_")):
        read_processor(stated, family=family)


def test_settings_without_effect_and_empty_ones_are_read_over() -> None:
    noise = {"do_convert_rgb": None, "do_pan_and_scan": None, "processor_class": "X", "image_seq_length": 256}
    assert read_processor({**GEMMA, **noise}, family="gemma3") == read_processor(GEMMA, family="gemma3")


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(InputError, match="unknown model family 'blip'; allowed: llava"):
        read_processor({}, family="blip")


@pytest.mark.parametrize("stated", [CLIP, {**CLIP, "image_aspect_ratio": "pad"}])
@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1)])
def test_a_thread_of_a_picture_costs_no_gigabytes(
    stated: dict[str, Any], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    contract = read_processor(stated, family="llava")
    made = [0]
    resize, new = Image.Image.resize, Image.new

    def noted_resize(image: Image.Image, shape: tuple[int, int], *rest: Any, **named: Any) -> Image.Image:
        made.append(shape[0] * shape[1])
        return resize(image, shape, *rest, **named)

    def noted_new(mode: str, shape: tuple[int, int], *rest: Any) -> Image.Image:
        made.append(shape[0] * shape[1])
        return new(mode, shape, *rest)

    monkeypatch.setattr(Image.Image, "resize", noted_resize)
    monkeypatch.setattr(Image, "new", noted_new)
    assert contract.apply(new("RGB", size, "red")).shape == (336, 336, 3)
    assert 0 < max(made) <= 336 * 20_000


@pytest.mark.parametrize("stated", [CLIP, {**CLIP, "image_aspect_ratio": "pad"}])
@pytest.mark.parametrize("size", [(601, 97), (97, 601)])
def test_the_way_around_a_large_step_gives_nearly_the_same_picture(
    stated: dict[str, Any], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    contract = read_processor(stated, family="llava")
    image = photograph(size).filter(ImageFilter.GaussianBlur(3))
    straight = contract.apply(image).astype(int)
    monkeypatch.setattr("safevlm.contract.preprocessing.LARGEST_STEP", 1000)
    difference = np.abs(contract.apply(image) - straight)
    assert difference.max() <= 4 and difference.mean() <= 0.1


def test_only_rgb_is_taken_and_the_contract_is_frozen() -> None:
    contract = read_processor(GEMMA, family="gemma3")
    with pytest.raises(InputError, match="mode L"):
        contract.apply(Image.new("L", (4, 4)))
    with pytest.raises(ValidationError, match="frozen"):
        contract.height = 3
    with pytest.raises(ValidationError, match="shortest_edge"):
        Preprocessing(**{**contract.model_dump(), "fit": "crop"})
    assert Preprocessing.model_validate_json(contract.model_dump_json()) == contract
