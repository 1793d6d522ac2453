"""Tiles find what the whole misses, and the figures are shares of the scenes that were pasted."""

from __future__ import annotations

from itertools import islice

from benchmarks.large_images import VIEWS, measure_views
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.network.loading import load_safe_vlm


def test_tiles_find_no_fewer_and_say_what_they_read() -> None:
    vlm = load_safe_vlm(open_checkpoint("tiny-safegem")).eval()
    found = list(islice(measure_views(vlm, 4), 4))
    for whole, tiles in zip(found[::2], found[1::2], strict=True):
        assert (whole.view, tiles.view) == VIEWS and whole.canvas == tiles.canvas == "336x336"
        assert tiles.recall >= whole.recall and tiles.false_blocks >= whole.false_blocks
        assert (whole.reads, tiles.reads) == (1, 10) and tiles.n == 4
