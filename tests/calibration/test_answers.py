"""A file of samples comes back answered by the model, ready to calibrate on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from calibration.holisafe_mini.scene import draw
from calibration.holisafe_mini.suite import build_suite
from calibration.sets.conversations import read_conversations
from calibration.sets.refusals import is_refusal

ROOT = Path(__file__).parents[2]


def test_a_file_is_answered_by_the_model(tmp_path: Path) -> None:
    suite = build_suite("calibration", pairs=100, questions=0)
    scenes = {picture.path: picture.scene for picture in suite.pictures}
    chosen = suite.pairs[:12]
    for item in chosen:
        path = tmp_path / "images" / item.row["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(scenes[item.row["image"]]).save(path)
    rows = [*(dict(item.row) for item in chosen), {"query": "Why is the sky blue?"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    command = [sys.executable, "-m", "calibration.answers", "--model", "tiny-safegem", "--calibration"]
    command += [str(tmp_path / "rows.json"), "--out", str(tmp_path / "answered.jsonl")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    answered = read_conversations(tmp_path / "answered.jsonl").samples
    assert [sample.question for sample in answered] == [row["query"] for row in rows]
    assert [sample.kind for sample in answered[:-1]] == [
        "safe" if item.row["type"] == "SSS" else "unsafe" for item in chosen
    ]
    right = [sample.answer == item.answer for sample, item in zip(answered, chosen, strict=False)]
    assert sum(right) >= 10, "a model that is right 99 times in 100"
    refusals = sum(is_refusal(str(sample.answer)) for sample in answered)
    assert f"13 answers, {refusals} of them refusals" in done.stdout
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert again.returncode == 2 and "exists" in again.stderr
