"""Write a checkpoint for llama.cpp: ``python -m export.gguf --model SafeLLaVA-7B --out DIR --type q4_k_m``."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import click
from rich.console import Console
from rich.markup import escape

from calibration.sets.mix import Mix
from calibration.sets.samples import CalibrationOptions
from calibration.streaming.batches import TokenWeights
from export.gguf.artifact import GgufOptions, export_gguf
from export.gguf.quantizing import PLAIN_TYPES, TYPES, type_of
from export.gguf.writing import StoredType
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.checkpoint.family import TapSource
from safevlm.checkpoint.hub import TINY_CHECKPOINTS
from safevlm.contract.gguf_manifest import GgufManifest
from safevlm.files.storage import shown_bytes
from safevlm.machine import return_freed_memory
from safevlm.network.distilled_head import DistilledHead
from safevlm.terminal.commandline import as_started, printable, run
from safevlm.terminal.options import grid_option, json_option, model_option, parse_grid, revision_option, tap_option

FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False)


@click.command(name="gguf")
@model_option()
@click.option("--out", type=FOLDER, required=True, help="Folder to write; must not exist.")
@click.option(
    "--type", "kind", default=GgufOptions.type, show_default=True, help=f"Type of the weights: {', '.join(TYPES)}."
)
@click.option(
    "--mmproj-type",
    default=GgufOptions.mmproj_type,
    show_default=True,
    help="Data type of the projector: f16, f32 or bf16.",
)
@click.option(
    "--calibration",
    type=FILE,
    help="JSONL file of conversations for the importance matrix.  [default for tiny checkpoints: built in]",
)
@click.option("--calibration-images", type=FOLDER, help="Folder that the image names in --calibration start from.")
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Number of samples for the importance matrix.",
)
@click.option(
    "--keep-out", type=FILE, multiple=True, help="Evaluation suite that must not leak into the samples; repeatable."
)
@click.option("--allow-leakage", is_flag=True, help="Continue after a leak is found; the manifest records it.")
@click.option("--no-importance", is_flag=True, help="Quantize without an importance matrix.")
@click.option(
    "--guard", type=FILE, help="Guard head that calibration.distill wrote, for a guard behind the language model."
)
@revision_option
@tap_option
@grid_option
@click.option("--images", type=FOLDER, help="Folder of images for the parity check.  [default: drawn images]")
@click.option(
    "--parity-images",
    type=click.IntRange(min=0),
    default=GgufOptions.parity_images,
    show_default=True,
    help="Number of images for the parity check.",
)
@click.option(
    "--max-memory", type=float, help="Maximum memory for activations in GiB.  [default: half of what is available]"
)
@json_option("the manifest")
def main(
    model: str,
    out: Path,
    kind: str,
    mmproj_type: str,
    calibration: Path | None,
    calibration_images: Path | None,
    samples: int,
    keep_out: tuple[Path, ...],
    allow_leakage: bool,
    no_importance: bool,
    guard: Path | None,
    revision: str | None,
    tap: TapSource | None,
    grid: str | None,
    images: Path | None,
    parity_images: int,
    max_memory: float | None,
    as_json: bool,
) -> None:
    """Write MODEL's language model, projector and guard for llama.cpp, checked against the checkpoint."""
    kind = type_of(kind)
    return_freed_memory()
    checkpoint = open_checkpoint(model, tap=tap, revision=revision)
    size = parse_grid(grid)
    measured = (calibration is not None or checkpoint.name in TINY_CHECKPOINTS) and not no_importance
    importance = None
    if measured and kind not in PLAIN_TYPES:
        importance = CalibrationOptions(
            file=calibration,
            images=calibration_images,
            mix=Mix(samples=samples),
            keep_out=keep_out,
            allow_leakage=allow_leakage,
            weights=TokenWeights(first_weight=1.0),  # the sink's few columns would be all that mean squares show
            grid=size,
        )
    options = GgufOptions(
        type=kind,
        mmproj_type=cast(StoredType, mmproj_type),
        importance=importance,
        distilled=None if guard is None else DistilledHead.read(guard),
        grid=size,
        images=images,
        parity_images=parity_images,
        **({} if max_memory is None else {"max_memory": int(max_memory * 2**30)}),
    )
    with Console(stderr=True).status("opening") as status:
        manifest = export_gguf(checkpoint, out, options, report=lambda stage: status.update(escape(stage)))
    if as_json:
        click.echo(manifest.model_dump_json(indent=1))
        return
    click.echo("\n".join(printable(as_started(line)) for line in _lines(manifest, out)))


def _lines(manifest: GgufManifest, out: Path) -> list[str]:
    random = " (random weights)" if manifest.random_weights else ""
    lines = [f"{out}: {manifest.source.checkpoint}{random} for llama.cpp"]
    lines += [f"  {file.path}  {shown_bytes(file.bytes)}" for file in manifest.files]
    if manifest.importance is not None:
        lines.append(
            f"importance matrix of {manifest.importance.tokens} tokens of {manifest.importance.samples} samples"
        )
    parity = manifest.parity
    if parity is not None:
        lines.append(
            f"exact guard on llama.cpp: max |Δp| {parity.max_abs_prob_delta:.1e}, {parity.label_flips} label flips on "
            f"{parity.images} images"
        )
    lines.append(f'next: python -m runtimes.chat --model {out} IMAGE "question"')
    return lines


if __name__ == "__main__":
    run(main)
