"""Changelog, citation, security, templates and hooks agree with the project and with their own formats."""

from __future__ import annotations

import re

import pytest
import yaml

from safevlm.version import VERSION
from tests.docs.pages import ROOT

CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
KINDS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]


def test_the_changelog_is_in_keep_a_changelog_s_form() -> None:
    versions = re.findall(r"^## (.+)$", CHANGELOG, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    dated = [re.fullmatch(r"\[(\d+)\.(\d+)\.(\d+)\] - (\d{4}-\d{2}-\d{2})", version) for version in versions[1:]]
    assert dated and all(dated), versions
    numbers = [(tuple(map(int, each.groups()[:3])), each[4]) for each in dated if each is not None]
    assert numbers == sorted(numbers, reverse=True), "newest first"
    for part in CHANGELOG.split("\n## ")[1:]:
        kinds = re.findall(r"^### (.+)$", part, re.MULTILINE)
        assert kinds == sorted(set(kinds), key=KINDS.index)


def test_the_newest_version_is_the_project_s() -> None:
    assert re.findall(r"^## \[([\d.]+)\]", CHANGELOG, re.MULTILINE)[0] == VERSION


def test_the_citation_has_what_its_schema_needs() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0" and cited["message"] and cited["type"] == "software"
    assert cited["title"] == "Safe-VLM Edge" and cited["version"] == VERSION
    assert cited["license"] in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert cited["authors"] == [{"name": "Safe-VLM Edge contributors"}]
    assert f"## [{VERSION}] - {cited['date-released']}" in CHANGELOG


@pytest.mark.parametrize("name", ["bug", "idea"])
def test_an_issue_form_is_complete(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text(encoding="utf-8"))
    assert form["name"] and form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_the_hooks_run_what_is_there() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert {"ruff", "ruff-format", "mypy", "layout"} <= {hook["id"] for hook in hooks}
    for hook in hooks:
        for word in hook["entry"].split():
            assert not word.startswith("tests/") or (ROOT / word).is_file(), word


def test_security_names_no_address_and_the_private_way() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert "private vulnerability reporting" in text and "@" not in text


def test_what_contributing_tells_to_type_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for target in re.findall(r"^make (\w+)", text, re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{name}: make {target}"


def test_every_path_that_contributing_names_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").replace("NAME_runner", "torch_runner")
    for path in re.findall(r"`((?:safevlm|runtimes|export|benchmarks|tests|docs)/[\w./]+)`", text):
        assert (ROOT / path.replace("NAME", "llava")).exists(), path
