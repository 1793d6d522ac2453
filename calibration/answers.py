"""The 16-bit model's own answers to calibration samples, refusals included: what a compressed model must still say.

Compressing lets the model answer by itself where it fits into memory. Where it does not, a larger machine can do it
beforehand: ``python -m calibration.answers --model M --calibration rows.jsonl --out answered.jsonl``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import click
import numpy as np
import torch

from calibration.sets.conversations import Sample, read_conversations
from calibration.sets.refusals import is_refusal
from safevlm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from safevlm.errors import InputError
from safevlm.files.json_file import replace_file
from safevlm.files.storage import check_writable
from safevlm.machine import memory_advice
from safevlm.network.device import torch_device
from safevlm.network.loading import load_safe_vlm
from safevlm.network.prompt_tokens import answer_ids
from safevlm.network.safe_vlm import SafeVLM
from safevlm.terminal.commandline import printable, run
from safevlm.terminal.options import device_option, grid_option, model_option, parse_grid, revision_option

__all__ = ["Answer", "own_answers", "pictures_of", "whole_model_bytes"]

BATCH = 16
LONG_SAMPLE = 1024
"""Tokens of an image, a question and an answer, as memory is counted for them."""
CACHED = (".self_attn.k_proj.weight", ".self_attn.v_proj.weight")
"""Whose outputs are kept of every token while the model answers."""
FILE = click.Path(path_type=Path, dir_okay=False)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is said to a sample; ``ids`` are the model's own tokens, ``None`` for a text from a file."""

    text: str
    ids: tuple[int, ...] | None = None


def whole_model_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Return the bytes of all parameters in ``dtype`` and of the cache: what must fit to let the model answer."""
    values, cached = 0, 0
    for name in checkpoint.tensors.names():
        shape = checkpoint.tensors.shape(name)
        values += int(np.prod(shape))
        if name.startswith(checkpoint.family.language_prefix) and name.endswith(CACHED):
            cached += shape[0]  # of every token
    return (values + BATCH * LONG_SAMPLE * cached) * dtype.itemsize


def own_answers(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    *,
    grid: tuple[int, int] | None = None,
    max_new_tokens: int = 64,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    report: Callable[[str], None] = lambda _: None,
) -> list[Answer]:
    """Return the greedy answer to every sample; the whole model is loaded for it.

    The end of the turn belongs to an answer that came to it within ``max_new_tokens``.

    Raises CheckpointError; ImageFileError with the sample's place; InputError for a device that is not there, and for
    memory that is full.
    """
    with memory_advice("Free it, use --dtype bfloat16, or take the answers from a file (--answers given)."):
        return _own_answers(checkpoint, samples, grid, max_new_tokens, dtype, torch_device(device), report)


def _own_answers(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    grid: tuple[int, int] | None,
    max_new_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    report: Callable[[str], None],
) -> list[Answer]:
    model = load_safe_vlm(checkpoint, grid=grid, dtype=dtype, device=device)
    questions = [len(model.tokenizer.encode(sample.question, add_special_tokens=False)) for sample in samples]
    order = sorted(range(len(samples)), key=lambda i: (samples[i].image is None, questions[i], i))
    answers: dict[int, Answer] = {}
    end = answer_ids(model.tokenizer, model.family.prompt, "")
    for _, group in groupby(order, key=lambda i: samples[i].image is None):
        rows = list(group)
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            report(f"answering calibration samples, {len(answers) + len(batch)} of {len(samples)}")
            asked = [samples[i] for i in batch]
            texts = [sample.question for sample in asked]
            if asked[0].image is None:
                prefill = model.embed_text(texts)
            else:
                with torch.inference_mode():
                    prefill = model.embed(pictures_of(model, asked).to(device), texts)
            for i, ids in zip(batch, model.generate(prefill, max_new_tokens), strict=True):
                text = str(model.tokenizer.decode(ids, skip_special_tokens=True)).strip()
                answers[i] = Answer(text=text, ids=(*ids, *end) if len(ids) < max_new_tokens else tuple(ids))
    return [answers[i] for i in range(len(samples))]


def pictures_of(model: SafeVLM, samples: Sequence[Sample]) -> torch.Tensor:
    """Return the samples' images at the contract's size: uint8 N × H × W × 3."""
    pictures = (sample.picture() for sample in samples)
    return torch.from_numpy(np.stack([model.preprocessing.apply(each) for each in pictures if each is not None]))


# -- the command ----------------------------------------------------------------------------------------


@click.command(name="answers")
@model_option()
@revision_option
@click.option(
    "--calibration", "file", type=FILE, required=True, help="JSONL file of conversations, as quantize.gptq reads them."
)
@click.option("--images", type=click.Path(path_type=Path, file_okay=False), help="Folder that image names start from.")
@click.option("--out", type=FILE, required=True, help="JSONL file to write: the same questions with answers.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Maximum length of an answer in tokens.",
)
@grid_option
@device_option
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Data type of the model's weights on torch.",
)
def main(
    model: str,
    revision: str | None,
    file: Path,
    images: Path | None,
    out: Path,
    max_new_tokens: int,
    grid: str | None,
    device: str,
    dtype: str,
) -> None:
    """Let MODEL answer calibration samples; quantize with the result and --answers given."""
    from rich.console import Console
    from rich.markup import escape

    if out.exists():
        raise InputError(f"{out} already exists. Give --out a new file, or remove this one.")
    check_writable(out)
    torch_device(device)
    read = read_conversations(file, images)
    with Console(stderr=True).status("opening") as status:
        answers = own_answers(
            open_checkpoint(model, revision=revision),
            read.samples,
            grid=parse_grid(grid),
            max_new_tokens=max_new_tokens,
            dtype=getattr(torch, dtype),
            device=device,
            report=lambda stage: status.update(escape(stage)),
        )
    rows = []
    for sample, answer in zip(read.samples, answers, strict=True):
        image = {} if sample.image is None else {"image": sample.name}
        rows.append({"query": sample.question, **image, "answer": answer.text, "kind": sample.kind})
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    replace_file(out, text.encode())
    refused = sum(is_refusal(answer.text) for answer in answers)
    told = f"{out}: {len(rows)} answers, {refused} of them refusals. Image names are still relative to {file.parent}"
    click.echo(printable(told))


if __name__ == "__main__":
    run(main)
