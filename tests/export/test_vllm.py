"""vLLM loads what we write, unmodified, and answers as our torch path does: all three families, 16, 8 and 4 bits.

``make peers`` makes ``.venv-vllm``; without it these tests skip, except where CI is set. vLLM's kernel for 4-bit
weights on a CPU is written in AVX-512. Where the processor has none, plain torch stands in for that one function: what
loads and repacks the files is vLLM's own either way, and each test says which one multiplied.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from calibration.holisafe_mini.scene import draw
from calibration.holisafe_mini.suite import build_suite
from export.hf import export_hf
from quantize.bits.auto_bits import mixed_plan
from quantize.bits.sensitivity import PARTS
from quantize.gptq import gptq_plan
from quantize.int8 import int8_plan
from quantize.methods.grid import Scheme
from quantize.methods.settings import Plan
from quantize.methods.solver import SolveOptions
from safevlm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from safevlm.network.loading import load_safe_vlm
from safevlm.network.prompt_tokens import IMAGE
from tests.quantize.streamed.test_compress import run
from tests.quantize.streamed.test_consumers import ROOT, peer

MODELS = ("tiny-safellava", "tiny-safeqwen", "tiny-safegem")
KINDS = ("16 bit", "int8", "gptq")
ROWS, MAX_TOKENS = 24, 32
HAS_AVX512 = "avx512f" in Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else False
KERNEL = "vLLM's own" if HAS_AVX512 else "plain torch in place of vLLM's AVX-512 kernel"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "PYTHONPATH": "",
}
Ask = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Return what has a job done by a process that has imported vLLM, in a fork of it."""
    folder = tmp_path_factory.mktemp("vllm")
    names = itertools.count()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [peer("vllm"), str(ROOT / "tests" / "peers" / "vllm_answers.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=folder,
            env={**os.environ, **ENVIRONMENT},
        )

        def answer(job: dict[str, Any]) -> dict[str, Any]:
            assert process.stdin is not None and process.stdout is not None
            out = folder / f"{next(names)}.json"
            process.stdin.write(json.dumps({**job, "out": str(out)}) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                if line.startswith('{"done"'):
                    break
            found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
            assert "error" not in found, found["error"]
            return found

        with process:
            yield answer
            assert process.stdin is not None
            process.stdin.close()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    folder = tmp_path_factory.mktemp("artifacts")

    def made(model: str, kind: str) -> Path:
        out = folder / f"{model}-{kind}".replace(" ", "-")
        if kind == "16 bit":
            return export_hf(open_checkpoint(model), out).out
        found = run(out, model, four_bits if kind == "gptq" else lambda _: int8_plan()).out
        assert found is not None
        return found

    return made


def four_bits(checkpoint: Checkpoint) -> Plan:
    return gptq_plan(checkpoint, Scheme(bits=4, group_size=32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", MODELS)
def test_vllm_gives_our_answers(
    model: str,
    kind: str,
    ask: Ask,
    artifact: Callable[[str, str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = artifact(model, kind)
    vlm = load_safe_vlm(open_checkpoint(folder))
    suite = build_suite(pairs=100, questions=0)
    scenes = {picture.path: picture.scene for picture in suite.pictures}
    rows = [pair.row for pair in suite.pairs[:ROWS]]
    images = [vlm.preprocessing.apply(draw(scenes[row["image"]])) for row in rows]  # at size: nobody resizes again
    asked = [{"image": str(tmp_path / f"{at}.png"), "question": row["query"]} for at, row in enumerate(rows)]
    for each, image in zip(asked, images, strict=True):
        Image.fromarray(image).save(each["image"])
    found = ask({"folder": str(folder), "rows": asked, "max_tokens": MAX_TOKENS})
    image_id = vlm.tokenizer.convert_tokens_to_ids(vlm.family.chat.image_token)
    for row, prompt in zip(asked, found["prompts"], strict=True):
        own = vlm.prompt_ids(row["question"])
        assert [IMAGE if token == image_id else token for token in prompt] == own, "the template is the family's"
    ours: list[str] = []
    for start in range(0, ROWS, 8):
        part = slice(start, start + 8)
        questions = [row["question"] for row in asked[part]]
        answers = vlm.answer(torch.from_numpy(np.stack(images[part])), questions, MAX_TOKENS)
        ours += [answer.text for answer in answers]
    with capsys.disabled():
        multiplied = f", 4-bit kernel: {found['kernel']}" if kind == "gptq" else ""
        sys.stdout.write(f"\n{model}, {kind}: vLLM in {found['dtype']}{multiplied}\n")
    assert all(found["ended"]), "what ends an answer is known there"
    same = sum(mine == theirs for mine, theirs in zip(ours, found["answers"], strict=True))
    assert same == ROWS, [pair for pair in zip(ours, found["answers"], strict=True) if pair[0] != pair[1]]
    assert len(set(ours)) > 3 and found["kernel"] == KERNEL


def test_vllm_reads_the_bits_of_every_linear(ask: Ask, tmp_path: Path) -> None:
    """Rules name what vLLM fuses, too, and its vision tower stays in 16 bit though its linears' names are the same."""
    bits = {(0, "attention"): 8, (0, "mlp"): 4, (1, "attention"): 4, (1, "mlp"): 16, (2, "attention"): 4, (2, "mlp"): 4}

    def plan(checkpoint: Checkpoint) -> Plan:
        schemes = {each: Scheme(bits=each, group_size=32) for each in (4, 8)}
        options = SolveOptions()
        return mixed_plan(
            checkpoint, bits, schemes, options, lambda scheme, more: gptq_plan(checkpoint, scheme, options, more), {}
        )

    found = run(tmp_path / "out", "tiny-safellava", plan)
    fused = {"attention": ("qkv_proj", "o_proj"), "mlp": ("gate_up_proj", "down_proj")}
    wanted = {
        f"language_model.model.layers.{layer}.{PARTS[part][0].split('.')[0]}.{name}": width
        for (layer, part), width in bits.items()
        for name in fused[part]
    }
    wanted |= {f"vision_tower.vision_model.encoder.layers.0.self_attn.{name}": 16 for name in ("qkv_proj", "out_proj")}
    wanted |= {"vision_tower.vision_model.encoder.layers.0.mlp.fc1": 16}
    assert ask({"folder": str(found.out), "modules": list(wanted)})["bits"] == wanted
    assert any(
        "4 and 8 bits: GPTQModel reads the dynamic rules; vLLM does, too" in n for n in found.record["consumers"]
    )
