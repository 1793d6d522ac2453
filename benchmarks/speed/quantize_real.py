"""Round real weights by this project's ways and by its peers, on the same token ids, and measure what is lost.

This project runs as its commands do, ``python -m quantize.gptq`` and ``quantize.int8``; everyone in a process of its
own with one thread.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.real.names import CALIBRATION, CHECKPOINT, HELD_OUT, LANGUAGE_MODEL
from benchmarks.speed.isolation import run_isolated
from benchmarks.speed.quantize_peers import clocks
from benchmarks.speed.quantize_real_cases import RealCase, RealRow

__all__ = ["measure_real", "run_way"]


def measure_real(
    case: RealCase,
    folder: Path,
    who: Sequence[str],
    *,
    peers_python: Path,
    variables: Mapping[str, str],
    report: Callable[[str], None] = lambda _: None,
    done: Callable[[RealRow], None] = lambda _: None,
) -> tuple[int, tuple[RealRow, ...]]:
    """Round what ``benchmarks.real_checkpoint`` wrote into ``folder`` with everyone in ``who``.

    Return the number of calibration tokens and the rows; ``done`` is given each as soon as it is there. One that
    fails is a row with its reason. Raises InputError for too few rows or too little held-out text.
    """
    from benchmarks.speed.divergence import Reference

    ids = _calibration_ids(case, folder)
    report("the 16-bit model on held-out text")
    text = (folder / HELD_OUT).read_text(encoding="utf-8")
    reference = Reference(folder / CHECKPOINT, text, windows=case.windows, length=case.length, seed=case.seed)
    rows = []
    with tempfile.TemporaryDirectory(prefix="safevlm-real-") as name:
        subject = Path(name, "subject")
        subject.mkdir()
        (subject / LANGUAGE_MODEL).symlink_to((folder / LANGUAGE_MODEL).resolve())
        (subject / "samples.json").write_text(json.dumps(ids), encoding="utf-8")
        for bits in (8,) if case.int8 else case.bits:
            for peer in who:
                report(f"{peer}, {'int8' if case.int8 else f'{bits} bits'}")
                out = Path(name, "out")
                if peer in case.ways:
                    request = _way(case, folder, out, bits, case.options(peer))
                    outcome = run_isolated("benchmarks.speed.quantize_real:run_way", request, threads=1)
                else:
                    request = {"peer": peer, "folder": str(subject), "out": str(out), "threads": 1, "bits": bits}
                    more = {"group_size": case.group_size, "iterations": case.iterations, "int8": case.int8}
                    outcome = run_isolated(
                        "benchmarks.speed.quantize_peers:run_peer",
                        {**request, **more},
                        threads=1,
                        python=str(peers_python),
                        variables=variables,
                    )
                if outcome.problem is not None:
                    row = RealRow(peer=peer, bits=bits, problem=outcome.problem)
                else:
                    row = _judged(reference, case, peer, bits, out, outcome.answers[0])
                shutil.rmtree(out, ignore_errors=True)
                rows.append(row)
                done(row)
    return sum(map(len, ids)), tuple(rows)


def _calibration_ids(case: RealCase, folder: Path) -> list[list[int]]:
    """Return the token ids of the rows that are drawn, as calibration lays them out."""
    from calibration.answers import Answer
    from calibration.sets.conversations import read_conversations
    from calibration.sets.mix import Mix, choose
    from calibration.streaming.batches import lay_out
    from safevlm.checkpoint.checkpoint import open_checkpoint
    from safevlm.network.loading import load_safe_vlm

    mix = Mix(samples=case.rows, shares={"text": 1.0}, seed=case.seed)
    samples = choose(read_conversations(folder / CALIBRATION), mix)
    answers = [Answer(text=sample.answer or "") for sample in samples]
    model = load_safe_vlm(open_checkpoint(folder / CHECKPOINT, tap="language_model"))
    return [list(row.ids) for row in lay_out(model, samples, answers)]


def _way(case: RealCase, folder: Path, out: Path, bits: int, options: Sequence[str]) -> dict[str, Any]:
    given = {
        "--model": folder / CHECKPOINT,
        "--out": out,
        "--calibration": folder / CALIBRATION,
        "--mix": "text=1",
        "--samples": case.rows,
        "--seed": case.seed,
        "--answers": "given",
    }
    if not case.int8:
        given |= {"--bits": bits, "--group-size": case.group_size}
    arguments = [str(part) for pair in given.items() for part in pair] + list(options)
    return {"command": "int8" if case.int8 else "gptq", "arguments": arguments}


def run_way(request: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Run ``quantize.gptq`` or ``quantize.int8``, its ``command``, with its ``arguments``; answer as peers do."""
    import torch

    from quantize import gptq, int8
    from safevlm.version import VERSION

    torch.set_num_threads(1)
    spent_since = clocks()
    main = {"gptq": gptq.main, "int8": int8.main}[request["command"]]
    main.main(args=list(request["arguments"]), standalone_mode=False)
    yield {**spent_since(), "version": VERSION}


def _judged(reference: Any, case: RealCase, peer: str, bits: int, out: Path, answer: Mapping[str, Any]) -> RealRow:
    from safetensors.torch import load_file

    if peer in case.ways:
        found = reference.of_artifact(out)
    else:
        found = reference.of_weights(load_file(out / "weights.safetensors"), rounds_inputs=case.int8)
    return RealRow(
        peer=peer,
        bits=bits,
        version=answer["version"],
        kl={name: each.kl for name, each in found.items()},
        same_token={name: each.same_token for name, each in found.items()},
        seconds=answer["seconds"],
        cpu_seconds=answer["cpu_seconds"],
        peak_rss_bytes=answer["peak_rss_bytes"],
    )
