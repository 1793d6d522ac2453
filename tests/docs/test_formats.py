"""The example of each file format is a file that its reader takes."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from benchmarks.comparison.margins import Margins, read_margins
from benchmarks.judges.labels import read_labels as read_answer_labels
from calibration.labelled.labels import read_labels
from calibration.sets.conversations import read_conversations
from runtimes.gateway.__main__ import main as gateway
from runtimes.gateway.serving.clients import read_clients
from runtimes.guard.policy import read_policy
from safevlm.checkpoint.guard_head import standard_classes
from tests.docs.pages import blocks
from tests.runtimes.bundles import RED, picture


@pytest.fixture
def written(tmp_path: Path) -> dict[str, Path]:
    """Each example as a file, beside the images that it names."""
    for number, name in enumerate(("a.png", "b.png")):
        picture(tmp_path / name, (*RED[:2], number))
    found = {}
    for block in blocks(*(f"format: {name}" for name in FORMATS)):
        name = block.mark.removeprefix("format: ")
        suffix = {"json": "jsonl"}.get(block.language, block.language)
        found[name] = tmp_path / f"{name.replace(' ', '-')}.{suffix}"
        found[name].write_text(block.text, encoding="utf-8")
        found[name].chmod(0o600)
    return found


FORMATS = ("labels", "conversations", "policy", "margins", "answer labels", "client keys", "gateway options")


def test_every_format_has_its_example(written: dict[str, Path]) -> None:
    assert set(written) == set(FORMATS)


def test_labels_and_rows(written: dict[str, Path]) -> None:
    classes = standard_classes()
    labels = read_labels(written["labels"], classes)
    assert sorted(classes[image.label] for image in labels.images) == ["animal_abuse", "safe"]
    rows = read_conversations(written["conversations"], None)
    assert [sample.kind for sample in rows.samples] == ["unsafe", "safe", "text"]
    told = [(label.run, label.id, label.ok) for _, label in read_answer_labels(written["answer labels"])]
    assert told == [("baseline", "pair-1014", True), ("candidate", "pair-1014", False)]


def test_policy_and_margins(written: dict[str, Path]) -> None:
    policy = read_policy(written["policy"])
    policy.check(standard_classes())
    assert policy.action("financial_advice") == "allow" and policy.guard is not None and policy.guard.block == 0.9
    assert read_margins(written["margins"]) == Margins(), "the page shows the defaults"


def test_keys_and_options_of_the_gateway(written: dict[str, Path]) -> None:
    assert read_clients(written["client keys"]) is not None
    context = click.Context(gateway)
    with context:
        gateway.parse_args(context, ["--config", str(written["gateway options"])])
    assert context.params["max_images"] == 4 and context.params["upstream"] == "http://127.0.0.1:8000/v1"
