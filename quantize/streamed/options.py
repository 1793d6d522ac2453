"""Options that all commands of this folder share, and how they show what happens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from rich.console import Console

from calibration.sets.beginnings import Beginnings
from calibration.sets.mix import Mix, read_mix
from calibration.sets.samples import CalibrationOptions
from calibration.streaming.batches import TokenWeights
from quantize.methods.rotation import ROTATIONS
from quantize.methods.settings import Progress, RunOptions
from quantize.streamed.compress import Compressed
from quantize.streamed.estimate import shown_seconds
from safevlm.files.storage import shown_bytes
from safevlm.network.device import multiplies_bfloat16, torch_device
from safevlm.terminal.commandline import as_started, printable
from safevlm.terminal.options import device_option, grid_option, json_option, model_option, parse_grid, revision_option

__all__ = ["calibration_of", "describe", "progress_on", "rotate_option", "run_of", "shared_options"]

Command = TypeVar("Command", bound=Callable[..., Any])
FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False)
SHOWN = 5

OPTIONS = (
    model_option(),
    revision_option,
    click.option("--out", type=FOLDER, required=True, help="Folder to write; must not exist."),
    click.option(
        "--calibration",
        "file",
        type=FILE,
        help="JSONL file of conversations.  [default for tiny checkpoints: built in]",
    ),
    click.option("--images", type=FOLDER, help="Folder that image names start from.  [default: that of --calibration]"),
    click.option("--samples", type=int, default=128, show_default=True, help="Number of calibration samples."),
    click.option(
        "--mix", default="unsafe=0.4,safe=0.4,text=0.2", show_default=True, help="Shares of the kinds of samples."
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Random seed for the choice of samples."),
    click.option(
        "--keep-out", type=FILE, multiple=True, help="Evaluation suite that must not leak into the samples; repeatable."
    ),
    click.option("--allow-leakage", is_flag=True, help="Continue after a leak is found; the artifact records it."),
    click.option(
        "--answers",
        type=click.Choice(["auto", "own", "given", "none"]),
        default="auto",
        show_default=True,
        help="Answers to calibrate on: the 16-bit model's own, given in the file, or none; auto is own where "
        "it fits into memory.",
    ),
    click.option(
        "--max-length", type=int, help="Maximum length of a sample in tokens.  [default: the model's context]"
    ),
    click.option(
        "--image-share",
        type=float,
        default=0.5,
        show_default=True,
        help="Maximum weight of image tokens in a sample, as a share.",
    ),
    click.option(
        "--refusal-weight", type=float, default=2.0, show_default=True, help="Weight of refusal tokens in the Hessian."
    ),
    click.option(
        "--token-weights",
        type=click.Choice(["fixed", "gradient"]),
        default=TokenWeights.by,
        show_default=True,
        help="Weights of a sample's tokens: fixed, or shifted by the gradient of the answer's loss.",
    ),
    click.option(
        "--guard-weight",
        type=float,
        default=TokenWeights.guard_weight,
        show_default=True,
        help="Weight of image tokens that a guard behind the language model reads, on top of --image-share.",
    ),
    click.option(
        "--first-weight",
        type=float,
        default=TokenWeights.first_weight,
        show_default=True,
        help="Weight of the first token of a sample, an attention sink, in the Hessian.",
    ),
    click.option(
        "--other-beginnings",
        type=float,
        default=Beginnings.share,
        show_default=True,
        help="Share of samples that begin with another or no system text, an earlier turn, or anywhere.",
    ),
    grid_option,
    click.option(
        "--max-memory", type=float, help="Maximum memory of the process in GiB.  [default: 80 % of what is available]"
    ),
    click.option(
        "--layers", type=int, help="Number of layers to compress now; the rest is resumed by the same command."
    ),
    click.option(
        "--guard-images", type=int, default=64, show_default=True, help="Number of images for the guard's drift."
    ),
    device_option,
    click.option(
        "--dtype",
        type=click.Choice(["auto", "mixed", "float32", "bfloat16"]),
        default="auto",
        show_default=True,
        help="Weights' data type; mixed multiplies float32 as bfloat16; auto is mixed for GPTQ where that is faster.",
    ),
    json_option("compression.json"),
)


rotate_option = click.option(
    "--rotate",
    type=click.Choice(ROTATIONS),
    default="none",
    show_default=True,
    help="Turn the attention's values, the residual stream or both by orthogonal matrices merged into the weights.",
)


def shared_options(command: Command) -> Command:
    """Give a command the options that :func:`calibration_of` and :func:`run_of` read."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def calibration_of(given: Mapping[str, Any]) -> CalibrationOptions:
    """Return what is calibrated on. Raises InputError for values that are not allowed."""
    return CalibrationOptions(
        file=given["file"],
        images=given["images"],
        mix=Mix(samples=given["samples"], shares=read_mix(given["mix"]), seed=given["seed"]),
        keep_out=tuple(given["keep_out"]),
        allow_leakage=given["allow_leakage"],
        answers=given["answers"],
        max_length=given["max_length"],
        weights=TokenWeights(
            image_share=given["image_share"],
            refusal_weight=given["refusal_weight"],
            guard_weight=given["guard_weight"],
            first_weight=given["first_weight"],
            by=given["token_weights"],
        ),
        beginnings=Beginnings(share=given["other_beginnings"]),
        grid=parse_grid(given["grid"]),
    )


def run_of(given: Mapping[str, Any], *, rounds_inputs: bool = False) -> RunOptions:
    """Return how the run is done; a method that rounds inputs, too, is not told by ``auto`` to round more of them.

    Raises InputError for values that are not allowed.
    """
    mixed = given["dtype"] == "mixed"
    if given["dtype"] == "auto":
        mixed = not rounds_inputs and multiplies_bfloat16(torch_device(given["device"]))
    return RunOptions(
        max_memory=None if given["max_memory"] is None else int(given["max_memory"] * 2**30),
        device=given["device"],
        dtype=torch.bfloat16 if given["dtype"] == "bfloat16" else torch.float32,
        products=torch.bfloat16 if mixed else None,
        layers=given["layers"],
        guard_images=given["guard_images"],
    )


@contextmanager
def progress_on(console: Console) -> Iterator[Progress]:
    """Show a status line, and a line for each layer, on ``console``."""
    with console.status("opening") as status:

        def layer(index: int, layers: int, report: Sequence[Mapping[str, Any]], seconds: float) -> None:
            worst = max(report, key=lambda row: row.get("relative_error", 0.0))
            kept = sum(row["kept"] == "rtn" for row in report)
            nearest = f", {kept} rounded to the nearest" if kept else ""
            console.print(
                f"layer {index + 1} of {layers}: output error at most {worst.get('relative_error', 0.0):.2%} "
                f"({worst['linear']}){nearest}, {shown_seconds(seconds)}",
                highlight=False,
                markup=False,
            )

        yield Progress(
            status=status.update,
            say=lambda line: console.print(printable(line), highlight=False, markup=False),
            layer=layer,
        )


def describe(found: Compressed, command: str) -> list[str]:
    """Return what is to be said at the end, line by line."""
    record = found.record
    if found.out is None:
        each = found.seconds_per_layer or found.estimate.seconds_per_layer
        layers = found.estimate.layers
        return [
            f"{len(record['layers'])} of {layers} layers are finished and kept. Run the command again, without "
            "--layers, to resume it",
            f"the whole model: about {shown_seconds(each * layers)} at {shown_seconds(each)} a layer",
        ]
    summary, measured = record["summary"], record["measured"]
    lines = [
        f"{found.out}: {record['source']['name']} at {summary['bits_per_weight']:.2f} bits per weight of the decoder, "
        f"{shown_bytes(summary['bytes'])} ({shown_bytes(summary['bytes_in_16_bit'])} in 16 bit)",
        _answers_line(record["answers"]),
        _held_out_line(record["held_out_kl"]),
        _guard_line(record["guard"], turned=record["rotation"]["rotate"] in ("residual", "both")),
    ]
    if record["rotation"]["rotate"] != "none":
        lines.append(
            f"rotation ({record['rotation']['rotate']}): it alone moves the exact guard's probabilities by "
            f"{record['rotation']['guard_difference']:.1g} at most"
        )
    nearest = summary["rounded_to_nearest"]
    if nearest:
        more = f" and {len(nearest) - SHOWN} more" if len(nearest) > SHOWN else ""
        lines.append(f"rounded to the nearest, which was better there: {', '.join(nearest[:SHOWN])}{more}")
    if summary["damped_more"]:
        lines.append(f"damped more than --damp: {', '.join(summary['damped_more'][:SHOWN])}")
    lines += [f"note: {line}" for line in record["consumers"]]
    if record["anomalous"]:
        lines.append("ANOMALOUS: calibration samples belong to an evaluation suite; see compression.json")
    if record["random_weights"]:
        lines.append("RANDOM WEIGHTS: answers mean nothing; only sizes and times are valid")
    memory = f"{shown_bytes(measured['peak_memory_bytes'])} of memory"
    if measured["gpu"]:
        memory += f" and {shown_bytes(measured['peak_gpu_memory_bytes'])} of {measured['gpu']}"
    lines.append(f"{shown_seconds(measured['seconds'])}, at most {memory}; next: {command}")
    return lines


def _answers_line(answers: Mapping[str, Any]) -> str:
    def stated(kind: str) -> str:
        drift = answers[kind]
        if not drift["tokens"]:
            return f"no {kind}"
        return f"{drift['same_token']:.1%} of {drift['tokens']} tokens of {kind}"

    return f"answers ({answers['are']}): the compressed model chooses {stated('refusals')}, {stated('others')}"


def _held_out_line(kl: Mapping[str, Any]) -> str:
    if not kl["tokens"]:
        return "KL to the 16-bit model: not compared (no sample fits with another beginning)"
    on = "held-out" if kl["unseen"] else "the same, as there are no others,"
    return (
        f"KL to the 16-bit model on {on} samples: {kl['as_calibrated']:.4f} as calibrated, "
        f"{kl['other_beginnings']:.4f} with other beginnings ({kl['tokens']} tokens of {kl['samples']} samples)"
    )


def _guard_line(guard: Mapping[str, Any], *, turned: bool) -> str:
    if not guard["n"]:
        return "guard: not compared (the samples have no images, or --guard-images is 0)"
    held = "held-out " if guard["held_out"] else ""
    projector = f"on the projector, which is {'turned' if turned else 'unchanged'}"
    behind = "behind the language model" if guard["tap"] == "language_model" else projector
    return (
        f"exact guard ({behind}) on {guard['n']} {held}images: {guard['label_flips']} labels changed "
        f"({guard['unsafe_to_safe']} from unsafe to safe), probabilities by {guard['max_probability_difference']:.4f} "
        f"at most, {guard['mean_probability_difference']:.4f} on average"
    )


def finish(found: Compressed, as_json: bool, command: str) -> None:
    """Print the result."""
    said = json.dumps(found.record, indent=1) if as_json else printable("\n".join(describe(found, as_started(command))))
    click.echo(said)
