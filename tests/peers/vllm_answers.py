"""Run in vLLM's environment: load artifacts and answer questions about pictures, a line of JSON a job.

Each line of stdin is ``{"folder", "max_tokens", "rows": [{"image", "question"}], "out"}``, or with ``modules`` in place
of rows, of which vLLM says by the artifact's config how many bits they have. vLLM is imported once and each job is done
in a fork of this process, so that an engine costs seconds. What was found is written to ``out``, and a line says so on
stdout.

The kernel that multiplies by 4-bit weights on a CPU is written in AVX-512. Where the processor lacks it, plain torch
stands in for that one function; what vLLM does before (names, fusing, sharding, repacking) is its own everywhere.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import vllm._custom_ops as operators
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.model_executor.models import registry

BITS, CHANNELS, ZERO = 4, 16, 8
OWN_KERNEL = torch.cpu._is_avx512_supported()
unpacked: dict[int, torch.Tensor] = {}


def multiply(
    input: torch.Tensor,  # noqa: A002
    q_weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    pack_factor: int,
    isa_hint: str,
) -> torch.Tensor:
    """Multiply by 4-bit weights in vLLM's CPU layout: blocks of 16 output channels, in each a row of words an input.

    Shapes: N × C inputs, C × R weights with G groups of inputs; words R/16 × 2C, scales G × R.
    """
    if q_weight.data_ptr() not in unpacked:
        assert zeros is None, "only symmetric weights come here"
        blocks, words = len(q_weight), CHANNELS * BITS // 32
        inputs = q_weight.shape[1] // words
        shifts = torch.arange(0, 32, BITS, dtype=torch.int32)
        ints = (q_weight.view(blocks, inputs, words, 1) >> shifts) & (2**BITS - 1)
        ints_CR = ints.permute(1, 0, 2, 3).reshape(inputs, blocks * CHANNELS) - ZERO
        unpacked[q_weight.data_ptr()] = ints_CR * scales.float().repeat_interleave(inputs // len(scales), 0)
    found = input.float() @ unpacked[q_weight.data_ptr()]
    return (found if bias is None else found + bias.float()).to(input.dtype)


def answered(job: dict[str, Any]) -> dict[str, Any]:
    """Load an artifact and answer its rows greedily, through the checkpoint's own chat template."""
    model = LLM(
        job["folder"],
        dtype="auto",
        max_model_len=512,
        max_num_seqs=8,
        enforce_eager=True,
        limit_mm_per_prompt={"image": 1},
        seed=0,
    )
    asked = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image_pil", "image_pil": Image.open(row["image"]).convert("RGB")},
                    {"type": "text", "text": row["question"]},
                ],
            }
        ]
        for row in job["rows"]
    ]
    found = model.chat(asked, SamplingParams(temperature=0.0, max_tokens=job["max_tokens"]), use_tqdm=False)
    return {
        "answers": [each.outputs[0].text.strip() for each in found],
        "prompts": [list(each.prompt_token_ids) for each in found],
        "ended": [each.outputs[0].finish_reason == "stop" for each in found],
        "dtype": str(model.llm_engine.vllm_config.model_config.dtype).removeprefix("torch."),
        "kernel": "vLLM's own" if OWN_KERNEL else "plain torch in place of vLLM's AVX-512 kernel",
    }


def bits(job: dict[str, Any]) -> dict[str, Any]:
    """Return the bits of modules, by vLLM's names; 16 of those that are not quantized.

    Whether this machine has a kernel for so many is not asked: vLLM's for 8 bits is for GPUs alone.
    """
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization import auto_gptq
    from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig

    auto_gptq.verify_marlin_supported = lambda **_: None

    class Linear(LinearBase):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

    stated = json.loads((Path(job["folder"]) / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    config = AutoGPTQConfig.from_config(stated)
    config.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    config.maybe_update_config(job["folder"])
    found = {}
    for name in job["modules"]:
        method = config.get_quant_method(Linear(), name)
        plain = method is None or isinstance(method, UnquantizedLinearMethod)
        found[name] = 16 if plain else method.quant_config.weight_bits
    return {"bits": found}


def forked(job: dict[str, Any]) -> None:
    """Do a job in a process of its own, whose end is the engine's."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    code = 1
    try:
        registry._run_in_subprocess = lambda inspect: inspect()  # which would import all of vLLM again
        if not OWN_KERNEL:
            operators.cpu_gemm_wna16 = multiply
        found = bits(job) if "modules" in job else answered(job)
        Path(job["out"]).write_text(json.dumps(found), encoding="utf-8")
        code = 0
    except BaseException:  # the parent shows it
        Path(job["out"]).write_text(json.dumps({"error": traceback.format_exc()}), encoding="utf-8")
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    for line in sys.stdin:
        one = json.loads(line)
        forked(one)
        print(json.dumps({"done": one["out"]}), flush=True)
