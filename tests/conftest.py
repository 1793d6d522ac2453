"""What tests of several folders share because it takes seconds to make."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.killing import Warm, warm

TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what ``slow.txt`` names: ``make quick`` leaves it out, and two processes begin with it.

    Raises: UsageError for a line that names nothing, as after a move.
    """
    lines = (TESTS / "slow.txt").read_text(encoding="utf-8").splitlines()
    slow = {TESTS / line for line in lines if not line.startswith("#")}
    if gone := [str(path.relative_to(TESTS)) for path in sorted(slow) if not path.exists()]:
        raise pytest.UsageError(f"tests/slow.txt names what is not there: {', '.join(gone)}")
    for item in items:
        if slow & {item.path, *item.path.parents}:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def gguf_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of GGUF files (f16) of a tiny checkpoint, written once a session and not to be changed."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            from export.gguf.artifact import GgufOptions, export_gguf
            from safevlm.checkpoint.checkpoint import open_checkpoint

            out = tmp_path_factory.mktemp("gguf") / name
            export_gguf(open_checkpoint(name), out, GgufOptions(type="f16", parity_images=2))
            made[name] = out
        return made[name]

    return folder


@pytest.fixture(scope="session")
def parent() -> Iterator[Warm]:
    """Return the process that has imported the commands and forks a child for each run."""
    with warm() as running:
        yield running
