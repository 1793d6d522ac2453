"""Who quantizes the same language model: this project, GPTQModel, llm-compressor …; each in a process of its own.

A child reads a folder that the parent wrote (``language_model/``: a plain one in transformers' layout; ``checkpoint/``:
the same in a Safe-VLM; ``samples.json``: token ids, a list a row) and writes ``weights.safetensors``: the
dequantized weights of every linear. Children of the peers run in the peers' environment, so nothing of ours but
:mod:`safevlm.machine` is imported at the top.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safevlm.machine import peak_rss, return_freed_memory

__all__ = ["PEERS", "clocks", "run_peer"]

ROOM = 16 * 2**20
"""Bytes of hidden states that ours keeps in memory; the rest is in a file."""
PEERS = ("ours", "gptqmodel", "llm-compressor")


def run_peer(request: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Quantize as ``request`` says; answer with ``seconds``, ``peak_rss_bytes`` and the library's ``version``.

    ``seconds`` are from opening the model on disk to the quantized model on disk, imports not counted.
    """
    import torch

    torch.set_num_threads(int(request["threads"]))
    folder, out = Path(request["folder"]), Path(request["out"])
    out.mkdir(parents=True)
    os.chdir(out)  # GPTQModel writes logs where it is run
    yield _RUNS[str(request["peer"])](folder, out, request)


def _ours(folder: Path, out: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    from calibration.streaming.sequential import Activations, LayerStream
    from quantize.methods.gptq_method import Gptq
    from quantize.methods.grid import Scheme
    from quantize.streamed.artifact import write_tensors
    from quantize.streamed.caches import Caches
    from quantize.streamed.layers import round_layers
    from quantize.streamed.unfinished import Unfinished
    from safevlm.checkpoint.checkpoint import open_checkpoint
    from safevlm.network.device import multiplies_bfloat16, torch_device
    from safevlm.version import VERSION

    return_freed_memory()  # as our commands do
    ids = _ids(folder)
    spent_since = clocks()
    checkpoint = open_checkpoint(str(folder / "checkpoint"), tap="language_model")
    products = torch.bfloat16 if multiplies_bfloat16(torch_device("cpu")) else None  # as --dtype auto
    stream = LayerStream(checkpoint, products=products, token_ids=lambda _: [token for row in ids for token in row])
    each = max(1, 1024 // len(ids[0]))
    rows = [ids[start : start + each] for start in range(0, len(ids), each)]
    shapes = [(len(batch), len(batch[0]), checkpoint.hidden_size) for batch in rows]
    with (
        Activations(shapes, torch.float32, ROOM, out) as hidden,
        Caches(ROOM, out) as caches,
        Unfinished(out / "artifact", {}) as unfinished,
    ):
        batches = []
        for number, batch in enumerate(rows):
            prefill = stream.skeleton.assemble(batch)
            hidden[number].copy_(prefill.inputs_embeds)
            batches.append(replace(prefill, inputs_embeds=prefill.inputs_embeds.to("meta")))
        stream.forget_vision()
        scheme = Scheme(bits=int(request["bits"]), group_size=int(request["group_size"]))
        round_layers(
            stream,
            batches,
            hidden,
            Gptq(scheme_of=lambda _: scheme),
            write=unfinished.save_layer,
            caches=caches,
            last_states=False,
        )
        files = [unfinished.layer_file(index) for index in unfinished.finished()]
        (out / "written").mkdir()
        write_tensors(checkpoint, files, out / "written")
    spent = spent_since()
    _save(out, _dequantized(out / "written", "model.language_model."))
    return {**spent, "version": VERSION}


def _gptqmodel(folder: Path, out: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    import gptqmodel
    from gptqmodel import GPTQModel, QuantizeConfig

    ids = _ids(folder)
    samples = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids]
    spent_since = clocks()
    more: dict[str, Any] = {}
    if request["peer"] == "gptaq":
        from gptqmodel.quantization.config import GPTAQConfig

        more = {"gptaq": GPTAQConfig()}
    elif request["peer"] == "foem":
        from gptqmodel.quantization.config import FOEMConfig

        more = {"foem": FOEMConfig(alpha=0.0, beta=0.2)}
    config = QuantizeConfig(bits=int(request["bits"]), group_size=int(request["group_size"]), format="gptq", **more)
    model = GPTQModel.load(str(folder / "language_model"), config, device="cpu")
    model.quantize(samples, batch_size=_batch_size(ids))
    model.save(str(out / "written"))
    spent = spent_since()
    _save(out, _dequantized(out / "written", "model."))
    return {**spent, "version": gptqmodel.__version__}


def _llm_compressor(folder: Path, out: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    import llmcompressor
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from transformers import AutoModelForCausalLM

    ids = _ids(folder)
    data = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids])
    spent_since = clocks()
    model = AutoModelForCausalLM.from_pretrained(folder / "language_model", dtype=torch.float32)
    recipe: list[Any]
    if request.get("int8"):
        recipe = [
            SmoothQuantModifier(smoothing_strength=0.8),
            GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]),
        ]
    else:
        weights = QuantizationArgs(
            num_bits=int(request["bits"]), group_size=int(request["group_size"]), strategy="group", symmetric=True
        )
        groups = {"all": QuantizationScheme(targets=["Linear"], weights=weights)}
        recipe = [GPTQModifier(config_groups=groups, ignore=["lm_head"])]
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        num_calibration_samples=len(ids),
        max_seq_length=max(map(len, ids)),
        batch_size=_batch_size(ids),
    )
    ends = ("_proj.weight", "norm.weight") if request.get("int8") else ("_proj.weight",)  # smoothing divides norms
    kept = {name: value for name, value in model.state_dict().items() if name.endswith(ends)}
    found = {name.removeprefix("model."): value.float().clone() for name, value in kept.items()}
    model.save_pretrained(out / "written", save_compressed=True)
    spent = spent_since()
    _save(out, found)
    return {**spent, "version": llmcompressor.__version__}


def _autoround(folder: Path, out: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    import auto_round
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = _ids(folder)
    longest = max(map(len, ids))
    data = [
        {
            "input_ids": torch.tensor([[*row, *[0] * (longest - len(row))]]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row))]),
        }
        for row in ids
    ]
    spent_since = clocks()
    rounder = AutoRound(
        AutoModelForCausalLM.from_pretrained(folder / "language_model", dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder / "language_model"),
        scheme={"bits": request["bits"], "group_size": request["group_size"], "sym": True, "data_type": "int"},
        dataset=data,
        iters=request["iterations"],
        nsamples=len(ids),
        seqlen=longest,
        batch_size=8,
        device_map="cpu",
        enable_torch_compile=False,
    )
    model, _ = rounder.quantize()
    spent = spent_since()
    kept = {name: value for name, value in model.state_dict().items() if name.endswith("_proj.weight")}
    _save(out, {name.removeprefix("model."): value.float() for name, value in kept.items()})
    return {**spent, "version": auto_round.__version__}


def clocks() -> Callable[[], dict[str, Any]]:
    """Begin to count; what is returned gives ``seconds``, ``cpu_seconds`` and ``peak_rss_bytes`` up to its call."""
    started, used = time.perf_counter(), time.process_time()
    return lambda: {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - used,
        "peak_rss_bytes": peak_rss(),
    }


def _ids(folder: Path) -> list[list[int]]:
    found: list[list[int]] = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    return found


def _batch_size(ids: list[list[int]]) -> int:
    """Return how many rows of one length make up a batch of about 2048 tokens; rows of many lengths go one by one."""
    return max(1, 2048 // len(ids[0])) if len({len(row) for row in ids}) == 1 else 1


def _dequantized(folder: Path, prefix: str) -> dict[str, Any]:
    """Return the weights that a GPTQ v1 folder stands for, by names after ``prefix``."""
    from safetensors.torch import load_file

    from safevlm.checkpoint.weights.quantized import GPTQ_PARTS, dequantized

    tensors = {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    return {
        f"{module.removeprefix(prefix)}.weight": dequantized({part: tensors[f"{module}.{part}"] for part in GPTQ_PARTS})
        for module in modules
    }


def _save(out: Path, weights: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    gc.collect()
    save_file({name: value.contiguous() for name, value in weights.items()}, out / "weights.safetensors")


_RUNS = {
    "ours": _ours,
    "gptqmodel": _gptqmodel,
    "gptaq": _gptqmodel,
    "foem": _gptqmodel,
    "llm-compressor": _llm_compressor,
    "autoround": _autoround,
}
