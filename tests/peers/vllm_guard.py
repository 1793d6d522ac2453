"""Run in vLLM's environment: serve a checkpoint with the guard's connector, and say what came of requests.

Each line of stdin is ``{"folder", "engine", "connector", "scenario", "rows", "out"}``: settings of engine and
connector, and a function of this file. vLLM is imported once and each job is done in a fork of this process.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

from PIL import Image
from vllm import LLM, SamplingParams


class Served:
    """A checkpoint in vLLM, its scheduler and worker in this process, stepped by hand."""

    def __init__(self, job: dict[str, Any]) -> None:
        layers = json.loads((Path(job["folder"]) / "config.json").read_text())["text_config"]["num_hidden_layers"]
        self.storage = Path(job["connector"]["shared_storage_path"])
        guarded = {
            "block_size": 32,
            "speculative_config": {
                "method": "extract_hidden_states",
                "num_speculative_tokens": 1,
                "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": [layers]}},
            },
            "kv_transfer_config": {
                "kv_connector": "SafeVLMGuard",
                "kv_role": "kv_producer",
                "kv_connector_extra_config": job["connector"],
                **({"kv_connector_module_path": "runtimes.vllm_guard.connector"} if job.get("by_path", True) else {}),
            },
        }
        usual = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 8, "enforce_eager": True, "seed": 0}
        self.model = LLM(job["folder"], **{**usual, **guarded, **job["engine"]})
        self.engine = self.model.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.preempted = 0
        preempt = self.scheduler._preempt_request

        def counted(*given: Any, **more: Any) -> Any:
            self.preempted += 1
            return preempt(*given, **more)

        self.scheduler._preempt_request = counted

    def ask(self, rows: list[Any], max_tokens: int = 1) -> list[dict[str, Any]]:
        """Ask about rows of content parts, all at once."""
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        found = self.model.chat([_messages(row) for row in rows], sampling, use_tqdm=False)
        return [_said(each) for each in found]

    def add(self, name: str, row: Any, max_tokens: int) -> None:
        """Begin a request, without a step."""
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        prompt = (
            self.model._preprocess_chat_one(_messages(row)) if hasattr(self.model, "_preprocess_chat_one") else None
        )
        prompt = prompt or _plain_prompt(self.model, row)
        self.engine.add_request(name, prompt, sampling)

    def step(self, times: int = 1) -> list[dict[str, Any]]:
        """Take steps; return what ended in them."""
        ended = []
        for _ in range(times):
            ended += [_said(each) | {"name": each.request_id} for each in self.engine.step() if each.finished]
        return ended

    def to_the_end(self) -> list[dict[str, Any]]:
        ended = []
        while self.engine.has_unfinished_requests():
            ended += self.step()
        return ended

    def files(self) -> list[str]:
        return sorted(path.name for path in self.storage.iterdir()) if self.storage.is_dir() else []


def _messages(row: Any) -> list[dict[str, Any]]:
    """Return a row's messages: of content parts alone, one user turn."""
    turns = row if isinstance(row[0], dict) and "role" in row[0] else [{"role": "user", "content": row}]
    return [{**turn, "content": _content(turn["content"])} for turn in turns]


def _content(content: Any) -> Any:
    if isinstance(content, str):
        return content
    return [
        {"type": "image_pil", "image_pil": Image.open(part["image"]).convert("RGB")}
        if "image" in part
        else {"type": "text", "text": part["text"]}
        for part in content
    ]


def _plain_prompt(model: LLM, row: Any) -> dict[str, Any]:
    """Return a prompt of one user turn for an engine that is stepped by hand."""
    tokenizer = model.get_tokenizer()
    marked = [{"type": "image"} if "image" in part else {"type": "text", "text": part["text"]} for part in row]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": marked}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    images = [Image.open(part["image"]).convert("RGB") for part in row if "image" in part]
    return {"prompt_token_ids": ids, "multi_modal_data": {"image": images}}


def _said(output: Any) -> dict[str, Any]:
    return {
        "params": output.kv_transfer_params,
        "ids": list(output.outputs[0].token_ids),
        "text": output.outputs[0].text,
        "prompt": list(output.prompt_token_ids),
        "cached": output.num_cached_tokens,
    }


def verdicts(served: Served, rows: list[Any]) -> dict[str, Any]:
    """Ask all at once, then one after another, whose prefix is then known."""
    at_once = served.ask(rows)
    return {"at_once": at_once, "again": [served.ask([row])[0] for row in rows], "files": served.files()}


def everything(served: Served, rows: list[Any]) -> dict[str, Any]:
    """Do what may go wrong with a request, one thing after another."""
    said: dict[str, Any] = {"at_once": served.ask(rows), "long": served.ask(rows, max_tokens=8)}
    said["text"] = served.ask([[{"text": "What is this?"}]])[0]
    for steps in (0, 1, 2, 3):  # before it is scheduled, in its prefill, behind it
        served.add(f"aborted-{steps}", rows[0], 20)
        served.step(steps)
        served.engine.abort_request([f"aborted-{steps}"])
        served.to_the_end()
        served.step()
    said["after_abort"] = served.files()
    said["after"] = served.ask(rows[:1])[0]
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, kept[1]))
    said["full"] = served.ask(rows[:1])[0]
    resource.setrlimit(resource.RLIMIT_FSIZE, kept)
    said["after_full"] = served.ask(rows[:1])[0]
    shutil.rmtree(served.storage)
    said["gone"] = served.ask(rows[:1])[0]
    served.storage.mkdir(mode=0o700)
    said["back"] = served.ask(rows[:1])[0]
    said["files"] = served.files()
    said["known"] = len(served.scheduler.connector.requests)
    return said


def preemption(served: Served, rows: list[Any]) -> dict[str, Any]:
    """Ask more at once than the cache holds."""
    found = served.ask(rows, max_tokens=100)
    return {"found": found, "preempted": served.preempted, "files": served.files()}


def left_out(served: Served, rows: list[Any]) -> dict[str, Any]:
    """Ask where vLLM does not run its drafter, as for a sequence that is too long for it, and ask again."""
    runner = served.engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    served.ask(rows[:1])  # another request's states are in the cache
    runner._input_fits_in_drafter = lambda _: False
    said = {"left_out": served.ask(rows[1:])}
    del runner._input_fits_in_drafter
    return {**said, "again": served.ask(rows[1:]), "files": served.files()}


def forked(job: dict[str, Any]) -> None:
    """Do a job in a process of its own, whose end is the engine's."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    try:
        found = globals()[job["scenario"]](Served(job), job["rows"])
        Path(job["out"]).write_text(json.dumps(found), encoding="utf-8")
    except BaseException:  # the parent shows it
        Path(job["out"]).write_text(json.dumps({"error": traceback.format_exc()}), encoding="utf-8")
    finally:
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    for line in sys.stdin:
        one = json.loads(line)
        forked(one)
        print(json.dumps({"done": one["out"]}), flush=True)
