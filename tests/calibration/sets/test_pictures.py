"""Where pictures come from: what is read, counted, named and refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from calibration.sets.pictures import BuiltIn, Folder, HubDataset, load_pictures, picture_source
from safevlm.contract.preprocessing import Preprocessing
from safevlm.errors import InputError, MissingExtraError

SIZE = Preprocessing(height=8, width=8, fit="squash", filter="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)


def draw(folder: Path, count: int, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    for number, each in enumerate(pixels):
        Image.fromarray(each).save(folder / f"{number:03}.png")


def test_a_folder_is_read_with_what_lies_below_it_each_content_once(tmp_path: Path) -> None:
    draw(tmp_path, 3)
    draw(tmp_path / "deeper", 2, seed=1)
    (tmp_path / "copy.png").write_bytes((tmp_path / "001.png").read_bytes())
    Image.open(tmp_path / "002.png").save(tmp_path / "same.bmp")  # other bytes, same pixels
    (tmp_path / "notes.txt").write_text("not a picture")
    found = load_pictures(Folder(path=tmp_path), SIZE)
    assert len(found) == 5 and found.duplicates == 2 and found.unreadable == ()
    assert found.rgb.shape == (5, 8, 8, 3) and len(set(found.sha256)) == 5
    assert [Path(name).name for name in found.names] == ["000.png", "001.png", "002.png", "000.png", "001.png"]


def test_few_unreadable_pictures_are_named_and_passed_over(tmp_path: Path) -> None:
    draw(tmp_path, 100)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    found = load_pictures(Folder(path=tmp_path), SIZE)
    assert len(found) == 100 and [Path(name).name for name in found.unreadable] == ["broken.png"]
    for number in range(7):
        (tmp_path / f"broken-{number}.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"8 of 108 images cannot be read \(.*broken-0.png, .* and 3 more\)"):
        load_pictures(Folder(path=tmp_path), SIZE)


@pytest.mark.parametrize(("made", "said"), [(False, "is not a folder"), (True, "a folder without image files")])
def test_an_empty_or_missing_folder_is_refused(tmp_path: Path, made: bool, said: str) -> None:
    folder = tmp_path / "pictures"
    if made:
        folder.mkdir()
    with pytest.raises(InputError, match=said):
        load_pictures(Folder(path=folder), SIZE)


def test_built_in_pictures_are_the_calibration_part() -> None:
    found = load_pictures(BuiltIn(pairs=120), SIZE)
    again = load_pictures(BuiltIn(pairs=120), SIZE)
    assert len(found) > 30 and found.sha256 == again.sha256


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("hub:owner/name", HubDataset(name="owner/name")),
        ("hub:owner/name@v1", HubDataset(name="owner/name", revision="v1")),
        ("hub:owner/name@v1:test", HubDataset(name="owner/name", revision="v1", split="test")),
        ("hub:owner/name:validation", HubDataset(name="owner/name", split="validation")),
        ("some/folder", Folder(path=Path("some/folder"))),
    ],
)
def test_what_images_names(spec: str, expected: Folder | HubDataset) -> None:
    assert picture_source(spec) == expected


def test_a_hub_without_a_name_is_refused() -> None:
    with pytest.raises(InputError, match=r"is not a data set. Give hub:owner/name"):
        picture_source("hub:")


class StandIn(ModuleType):
    """The datasets library, as far as it is used: streams rows, and keeps what it was asked for."""

    def __init__(self, rows: list[dict[str, Any]], error: Exception | None = None) -> None:
        super().__init__("datasets")
        self.rows, self.error, self.asked = rows, error, []  # type: ignore[var-annotated]

    def load_dataset(self, name: str, **options: Any) -> Iterator[dict[str, Any]]:
        self.asked.append((name, options))
        if self.error is not None:
            raise self.error
        return iter(self.rows)


def test_a_hub_data_set_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    stand_in = StandIn([{"image": Image.fromarray(each)} for each in pixels])
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    found = load_pictures(picture_source("hub:owner/name@v1:test"), SIZE)
    assert stand_in.asked == [("owner/name", {"split": "test", "revision": "v1", "streaming": True})]
    assert np.array_equal(found.rgb, pixels) and found.names == ("hub:owner/name#0", "hub:owner/name#1")


def test_a_hub_data_set_that_cannot_be_used_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", StandIn([{"photo": 1, "text": "x"}]))
    with pytest.raises(InputError, match=r"row 0: column 'image' holds no image. The columns are photo, text"):
        load_pictures(picture_source("hub:owner/name"), SIZE)
    monkeypatch.setitem(sys.modules, "datasets", StandIn([], ConnectionError("no network")))
    with pytest.raises(InputError, match=r"cannot be reached for 'owner/name' \(no network\).*--images FOLDER"):
        load_pictures(picture_source("hub:owner/name"), SIZE)
    monkeypatch.setitem(sys.modules, "datasets", StandIn([], ValueError('Unknown split "train"')))
    with pytest.raises(InputError, match=r"cannot be loaded \(Unknown split .*split \(train\)"):
        load_pictures(picture_source("hub:owner/name"), SIZE)

    def broken() -> Iterator[dict[str, Any]]:
        yield {"image": Image.new("RGB", (8, 8))}
        raise ConnectionError("reset by peer")

    monkeypatch.setitem(sys.modules, "datasets", StandIn(broken()))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"cannot be reached for .*\(reset by peer\)"):
        load_pictures(picture_source("hub:owner/name"), SIZE)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"safevlm-edge\[datasets\]"):
        load_pictures(picture_source("hub:owner/name"), SIZE)
