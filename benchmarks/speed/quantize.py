"""Time, memory and error of quantizing the same language model, this project and its peers side by side.

Every peer gets the same random weights and the same token ids, 4 bits in groups of 128, and its own defaults for the
rest. The error is that of the last hidden states on token ids that none has seen, against the float model.

Shapes: N samples, L positions, D width of the language model.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from benchmarks.random_checkpoint import write_random_checkpoint
from benchmarks.speed.isolation import run_isolated
from benchmarks.speed.quantize_cases import Case, QuantizeRow, QuantizeSpeed
from benchmarks.speed.quantize_peers import PEERS
from safevlm.checkpoint.family import HEAD_PREFIX
from safevlm.errors import InputError
from safevlm.machine import core_count
from safevlm.network.filling import on_meta

__all__ = ["PEER_VARIABLES", "measure_quantize"]

HELD_OUT = 4
PEER_VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # GPTQModel otherwise spends most of its time compiling
    "GPTQMODEL_CPU_WORKERS": "2",
}


def measure_quantize(
    case: Case,
    *,
    peers_python: Path | None,
    rounds: int = 1,
    threads: int | None = None,
    bits: int = 4,
    group_size: int = 128,
    report: Callable[[str], None] = lambda _: None,
) -> QuantizeSpeed:
    """Quantize ``case`` with everyone, by turns; ``peers_python`` is the interpreter of the peers' environment.

    Raises InputError when there is no such interpreter.
    """
    if peers_python is not None and not peers_python.exists():
        raise InputError(f"{peers_python} is missing. Run make peers to create the environment of the peers.")
    threads = core_count() if threads is None else threads
    peers = PEERS if peers_python is not None else PEERS[:1]
    found: dict[str, list[QuantizeRow]] = {peer: [] for peer in peers}
    with tempfile.TemporaryDirectory(prefix="safevlm-quantize-") as name:
        folder = Path(name)
        report("writing the model")
        held_out = _write_subject(case, folder)
        floats = load_file(folder / "language_model" / "model.safetensors")
        expected = _states(folder, floats, {}, held_out)
        for turn in range(rounds):
            for peer in peers:
                report(f"{peer}, round {turn + 1} of {rounds}")
                out = folder / f"{peer}-{turn}"
                request = {"peer": peer, "folder": str(folder), "out": str(out), "threads": threads}
                outcome = run_isolated(
                    "benchmarks.speed.quantize_peers:run_peer",
                    {**request, "bits": bits, "group_size": group_size},
                    threads=threads,
                    **({} if peer == "ours" else {"python": str(peers_python), "variables": PEER_VARIABLES}),  # type: ignore[arg-type]
                )
                if outcome.problem is not None:
                    found[peer].append(QuantizeRow(peer=peer, problem=outcome.problem))
                    continue
                states = _states(folder, floats, load_file(out / "weights.safetensors"), held_out)
                answer = outcome.answers[0]
                found[peer].append(
                    QuantizeRow(
                        peer=peer,
                        version=answer["version"],
                        seconds=answer["seconds"],
                        peak_rss_bytes=answer["peak_rss_bytes"],
                        error=float((states - expected).norm() / expected.norm()),
                    )
                )
                shutil.rmtree(out)
    rows = tuple(_best(rows) for rows in found.values())
    return QuantizeSpeed(case=case, threads=threads, rounds=rounds, bits=bits, group_size=group_size, rows=rows)


def _best(rows: list[QuantizeRow]) -> QuantizeRow:
    done = [row for row in rows if row.seconds is not None]
    if not done:
        return rows[0]
    return replace(
        done[0],
        seconds=min(row.seconds or 0.0 for row in done),
        peak_rss_bytes=max(row.peak_rss_bytes or 0 for row in done),
    )


def _write_subject(case: Case, folder: Path) -> Tensor:
    """Write the same language model twice, and token ids; return those that are held out."""
    write_random_checkpoint(case.shape(), folder / "checkpoint", layers=case.layers, layout="transformers")
    stored = load_file(folder / "checkpoint" / "model.safetensors")
    prefix = "model.language_model."
    llama = {f"model.{name.removeprefix(prefix)}": value for name, value in stored.items() if name.startswith(prefix)}
    (folder / "language_model").mkdir()
    save_file(
        {**llama, "lm_head.weight": stored["lm_head.weight"]},
        folder / "language_model" / "model.safetensors",
        {"format": "pt"},
    )
    config = _config(case)
    config.architectures = ["LlamaForCausalLM"]
    (folder / "language_model" / "config.json").write_text(config.to_json_string(use_diff=False), encoding="utf-8")
    for path in (folder / "checkpoint").glob("*token*"):
        shutil.copyfile(path, folder / "language_model" / path.name)
    assert any(name.startswith(HEAD_PREFIX) for name in stored)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 800, (case.samples + HELD_OUT, case.length), generator=generator)
    (folder / "samples.json").write_text(json.dumps(ids[: case.samples].tolist()), encoding="utf-8")
    return ids[case.samples :]


def _config(case: Case) -> LlamaConfig:
    return LlamaConfig(
        **{**case.language, "hidden_size": case.width, "num_hidden_layers": case.layers}, dtype="float16"
    )


@torch.no_grad()
def _states(folder: Path, floats: Mapping[str, Tensor], rounded: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Return the last hidden states, N × L × D, of the Llama with some of its weights replaced."""
    config = LlamaConfig(**json.loads((folder / "language_model" / "config.json").read_text(encoding="utf-8")))
    model: Any = on_meta(lambda: LlamaModel(config))
    for name, slot in list(model.named_parameters()):
        value = rounded.get(name, floats[f"model.{name}"])
        path, _, leaf = name.rpartition(".")
        assert value.shape == slot.shape, name
        setattr(model.get_submodule(path), leaf, torch.nn.Parameter(value.float(), requires_grad=False))
    if rounded:
        assert len(set(rounded) & dict(model.named_parameters()).keys()) == len(rounded) >= 7
    found: Tensor = model(input_ids=ids).last_hidden_state
    return found
