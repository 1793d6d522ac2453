"""What vLLM calls: a KV connector over the method ``extract_hidden_states``.

That method keeps the last layer's output of every token in the KV cache. The scheduler's half follows which image
positions a step computes (:mod:`.requests`); the worker's half applies norm, mean and head to them once a prompt is
complete, and hands the verdict over (:mod:`.storage`) before the scheduler sees the step's tokens, so that a request
that ends with its first token has it.

Where a step does not fit its drafter vLLM leaves the states out of the cache, and what is there then is of another
request. Each step therefore begins with NaN at the image positions that it is to compute: what was left out
stays NaN, which is an error and no verdict, and its blocks are not used again.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import vllm
from transformers import AutoTokenizer

from runtimes.vllm_guard.head import ExactHead, read_config
from runtimes.vllm_guard.requests import Image, Request, Requests, Work
from runtimes.vllm_guard.storage import Storage, StoredError
from runtimes.vllm_guard.verdict import Identity, image_stated, is_row, stated
from runtimes.vllm_guard.versions import require_tested
from safevlm.errors import InputError

require_tested(vllm.__version__, allow_untested=True)  # the modules below; the version with the settings

from vllm.distributed.kv_transfer.kv_connector.v1.base import (  # noqa: E402
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.v1.kv_cache_interface import HiddenStateCacheSpec  # noqa: E402

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["ENTRIES", "SafeVLMGuard", "StepWork"]

ENTRIES = frozenset({"shared_storage_path", "head_sha256", "classes", "allow_untested_vllm"})
"""Keys of ``kv_connector_extra_config``. ``head_sha256`` and ``classes`` are what the caller expects of the model."""
LAYERS_KEY = "eagle_aux_hidden_state_layer_ids"

_log = logging.getLogger("vllm.safe_vlm")


@dataclass
class StepWork(KVConnectorMetadata):  # type: ignore[misc]
    """What the scheduler asks of the worker in a step: requests, and the nonces of verdicts that nobody will read."""

    work: list[Work]
    forgotten: list[str]


class SafeVLMGuard(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """The exact guard's verdict on each image, in ``kv_transfer_params`` of each answer.

    Raises InputError at the start for settings under which no verdict, or not the right one, would come of it.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        extra = dict(self._kv_transfer_config.kv_connector_extra_config)
        _check_entries(extra)
        require_tested(vllm.__version__, allow_untested=extra.get("allow_untested_vllm") is True)
        folder = Path(vllm_config.model_config.model)
        self.head = ExactHead.read(folder)
        self.identity = Identity(head=self.head.sha256, classes=self.head.classes)
        _check_expected(extra, self.identity, folder)
        self.eps = float(vllm_config.model_config.hf_text_config.rms_norm_eps)
        _check_settings(vllm_config)
        self.group = _group_of_states(kv_cache_config)
        self.block_size = int(kv_cache_config.kv_cache_groups[self.group].kv_cache_spec.block_size)
        name = f"safe-vlm-{self._kv_transfer_config.engine_id}"
        self.storage = Storage.open(Path(extra.get("shared_storage_path") or Path(tempfile.gettempdir()) / name))
        self.requests = Requests()
        self.forgotten: list[str] = []
        self.before = _ids_before_image(folder, self.head) if role == KVConnectorRole.SCHEDULER else ()
        self.cache: torch.Tensor | None = None
        self.writes = False

    @property
    def requires_kv_delivery(self) -> bool:
        """No request waits for what this connector does with its cache."""
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:  # noqa: ARG003
        """A token's state is contiguous in the cache."""
        return "LBNHC"

    # -- in the scheduler -------------------------------------------------------------------------------

    def get_num_new_matched_tokens(
        self,
        request: Any,  # noqa: ARG002
        num_computed_tokens: int,  # noqa: ARG002
    ) -> tuple[int | None, bool]:
        """Nothing is ever loaded."""
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Nothing is ever loaded."""

    def build_connector_meta(self, scheduler_output: Any) -> StepWork:
        """Return what the worker has to do in this step."""
        for new in scheduler_output.scheduled_new_reqs:
            self.requests.begin(new.req_id, self._request(new))
        again = scheduler_output.scheduled_cached_reqs
        for at, request_id in enumerate(again.req_ids):
            blocks = again.new_block_ids[at]
            self.requests.resume(
                request_id,
                None if blocks is None else blocks[self.group],
                again.num_computed_tokens[at],
                replaced=request_id in again.resumed_req_ids,
            )
        steps = (self.requests.step(*each) for each in scheduler_output.num_scheduled_tokens.items())
        forgotten, self.forgotten = self.forgotten, []
        return StepWork(work=[each for each in steps if each is not None], forgotten=forgotten)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Return the request's verdicts; however it ended, nothing of it is left behind."""
        known = self.requests.finish(request.request_id)
        if known is None:
            return False, stated(self.identity, None, "the request was never computed")
        if not known.images and known.problem is None:
            return False, stated(self.identity, [])
        if known.problem is None and _identifiers(request.mm_features) != [each.identifier for each in known.images]:
            known.problem = "its prompt changed while it was served"
        if known.problem is None and not known.judged:
            known.problem = "it ended before its prompt was computed"
        found: dict[str, Any] = {}
        if known.problem is None:
            try:
                found = self.storage.take(request.request_id, known.nonce)
            except StoredError as error:
                known.problem = str(error)
        self.forgotten.append(known.nonce)  # a step that is under way may still write it
        if known.problem is not None:
            return False, stated(self.identity, None, known.problem)
        return False, stated(self.identity, self._images(known, found.get("images"), block_ids))

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """As :meth:`request_finished_all_groups`, where there is one group."""
        return self.request_finished_all_groups(request, (block_ids,))

    def shutdown(self) -> None:
        """Remove the folder, if no verdict is on its way."""
        self.storage.close()

    def _request(self, new: Any) -> Request:
        ids: list[int] = new.prompt_token_ids or []
        problem = None
        if new.lora_request is not None:
            problem = "an adapter changed the model that the guard reads"
        elif new.mm_features and (new.prompt_embeds is not None or not ids):
            problem = "its prompt was given as embeddings"
        images = tuple(self._image(feature, ids) for feature in new.mm_features)
        return Request(
            images=images,
            length=len(ids),
            blocks=list(new.block_ids[self.group]),
            computed=new.num_computed_tokens,
            problem=problem,
        )

    def _image(self, feature: Any, ids: Sequence[int]) -> Image:
        place = feature.mm_position
        inside = range(place.length) if place.is_embed is None else place.is_embed.nonzero().flatten().tolist()
        problem = None if feature.modality == "image" else f"the guard judges images, not {feature.modality}"
        return Image(
            positions=tuple(place.offset + at for at in inside),
            identifier=feature.identifier,
            usual=tuple(ids[: place.offset]) == self.before,
            problem=problem,
        )

    def _images(self, request: Request, rows: Any, block_ids: tuple[list[int], ...]) -> list[dict[str, Any]]:
        rows = rows if isinstance(rows, list) and len(rows) == len(request.images) else [None] * len(request.images)
        if not all(is_row(row, len(self.head.classes)) for row in rows) and self._kv_cache_manager is not None:
            self._kv_cache_manager.evict_blocks(set(block_ids[self.group]))
        return [
            image_stated(row, self.head.classes, usual=image.usual)
            if image.problem is None
            else {"error": image.problem}
            for image, row in zip(request.images, rows, strict=True)
        ]

    # -- in the worker ----------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Take the cache of hidden states, N blocks × 1 × tokens of a block × D. Raises InputError for another."""
        from vllm.config import get_layers_from_vllm_config
        from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
        from vllm.model_executor.models.extract_hidden_states import CacheOnlyAttentionLayer

        self.writes = get_tensor_model_parallel_rank() == 0
        layers = list(get_layers_from_vllm_config(self._vllm_config, CacheOnlyAttentionLayer, list(kv_caches)))
        if len(layers) != 1:
            raise InputError(f"vLLM keeps the hidden states of {len(layers)} layers; 1 is needed.")
        cache = kv_caches[layers[0]]
        if cache.ndim != 4 or cache.shape[1:] != (1, self.block_size, len(self.head.norm)):
            raise InputError(
                f"vLLM's cache of hidden states has shape {tuple(cache.shape)}; (blocks, 1, {self.block_size}, "
                f"{len(self.head.norm)}) is needed. Serve without the guard's connector, or with a tested vLLM."
            )
        self.cache, self.head = cache, self.head.to(cache.device)

    def bind_connector_metadata(self, connector_metadata: StepWork) -> None:
        """Begin a step: what it is to compute is NaN until it has."""
        super().bind_connector_metadata(connector_metadata)
        if self.cache is None:
            return
        for work in connector_metadata.work:
            if work.fresh:
                block, inside = self._slots(work.blocks, work.fresh)
                self.cache[block, 0, inside] = torch.nan

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing is ever loaded."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is ever loaded."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """The states are in the cache; see :meth:`wait_for_save`."""

    def wait_for_save(self) -> None:
        """End a step: judge the images of every prompt that it completed."""
        if not self.writes or not self.has_connector_metadata():
            return
        step = self._get_connector_metadata()
        for work in step.work:
            if work.judge is not None:
                self._judge(work, work.judge)
        for nonce in step.forgotten:
            self.storage.remove(nonce)

    def _judge(self, work: Work, images: Sequence[Sequence[int]]) -> None:
        """Write a request's probabilities; whatever fails, there is no file, which the scheduler reports."""
        try:
            rows = [self._probs(work.blocks, positions) for positions in images]
            self.storage.write(work.request_id, work.nonce, {"images": rows})
        except Exception as error:  # the server goes on, without a verdict for this request
            _log.exception("no verdict on request %s: %s", work.request_id, type(error).__name__)

    def _probs(self, blocks: Sequence[int], positions: Sequence[int]) -> list[float] | None:
        """Return C probabilities, None where the states of the image are not there."""
        assert self.cache is not None, "registered before the first step"
        if not positions:
            return None
        block, inside = self._slots(blocks, positions)
        found = self.head.probs(self.cache[block, 0, inside], self.eps)
        return found if is_row(found, len(self.head.classes)) else None

    def _slots(self, blocks: Sequence[int], positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the block in the cache and the place in it of each position."""
        assert self.cache is not None, "registered before the first step"
        found = torch.tensor([(blocks[at // self.block_size], at % self.block_size) for at in positions])
        block, inside = found.to(self.cache.device).unbind(1)
        return block, inside


def _identifiers(features: Sequence[Any]) -> list[str]:
    return [each.identifier for each in features]


def _check_entries(extra: dict[str, Any]) -> None:
    unknown = sorted(set(extra) - ENTRIES)
    if unknown:
        raise InputError(
            f"kv_connector_extra_config has the unknown key {unknown[0]!r}. Allowed: {', '.join(sorted(ENTRIES))}."
        )


def _check_expected(extra: dict[str, Any], identity: Identity, folder: Path) -> None:
    """Raise InputError for a model whose guard is not the one that the caller expects."""
    head, classes = extra.get("head_sha256"), extra.get("classes")
    if head is not None and head != identity.head:
        raise InputError(
            f"the guard head of {folder} has SHA-256 {identity.head[:12]}…, {str(head)[:12]}… was expected: the model "
            "is another checkpoint than its guard. Give the checkpoint that the bundle was exported from."
        )
    if classes is not None and list(classes) != list(identity.classes):
        raise InputError(
            f"the guard of {folder} has the classes {', '.join(identity.classes)[:200]}; others were expected. Give "
            "the checkpoint that the bundle was exported from."
        )


def _check_settings(config: VllmConfig) -> None:
    """Raise InputError for settings of vLLM under which the last layer's output is not whole in this cache."""
    needed = "Start the server with python -m runtimes.vllm, which sets what the guard needs."
    speculative = config.speculative_config
    if speculative is None or speculative.method != "extract_hidden_states":
        raise InputError(f"the guard needs --speculative-config with the method extract_hidden_states. {needed}")
    layers = list(getattr(speculative.draft_model_config.hf_config, LAYERS_KEY, None) or ())
    last = config.model_config.hf_text_config.num_hidden_layers
    if layers != [last]:
        raise InputError(f"the guard needs {LAYERS_KEY} = [{last}], the model's last layer, not {layers}. {needed}")
    parallel = config.parallel_config
    for name in ("pipeline_parallel_size", "prefill_context_parallel_size", "decode_context_parallel_size"):
        if getattr(parallel, name) != 1:
            raise InputError(f"the guard needs {name} = 1, not {getattr(parallel, name)}: use tensor parallelism.")
    if config.cache_config.cache_dtype not in ("auto", "bfloat16"):
        raise InputError(f"the guard needs --kv-cache-dtype auto, not {config.cache_config.cache_dtype}.")


def _group_of_states(kv_cache_config: Any) -> int:
    """Return which group of the KV cache holds the hidden states, the only one where they share the model's own.

    Raises InputError where several may, or none does.
    """
    groups = [isinstance(each.kv_cache_spec, HiddenStateCacheSpec) for each in kv_cache_config.kv_cache_groups]
    if len(groups) == 1:
        return 0
    if groups.count(True) != 1:
        raise InputError(f"vLLM's KV cache has {groups.count(True)} groups of hidden states; 1 is needed.")
    return groups.index(True)


def _ids_before_image(folder: Path, head: ExactHead) -> tuple[int, ...]:
    """Return the tokens before the image in a prompt of one user turn. Raises InputError where it has no image token.

    A leading beginning-of-sequence token is set as an id, as in ``safevlm.network.prompt_tokens``.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    prompt = head.family.prompt
    text, first = prompt.before_image, []
    if tokenizer.bos_token and text.startswith(tokenizer.bos_token):
        text, first = text.removeprefix(tokenizer.bos_token), [tokenizer.bos_token_id]
    ids = [*first, *tokenizer.encode(text + prompt.image_token, add_special_tokens=False)]
    image = tokenizer.convert_tokens_to_ids(prompt.image_token)
    config = read_config(folder)
    if image not in ids or image not in (config.get("image_token_id"), config.get("image_token_index")):
        raise InputError(
            f"{folder}: the tokenizer's {prompt.image_token!r} is not the config's image token. Write the checkpoint "
            "again: python -m export.hf."
        )
    return tuple(ids[: ids.index(image)])
