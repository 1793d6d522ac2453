"""The language model on torch: a checkpoint's whole model, answer and exact verdict from one prefill."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from runtimes.guard.activation import Turn
from runtimes.guard.exact_parts import ExactParts
from runtimes.guard.runner import GuardOutput
from runtimes.language.language import LanguageRunner, Prefilled
from runtimes.language.question import MOST_CONTEXT, Reader
from runtimes.language.writing import Writing
from safevlm.errors import InputError, MissingExtraError
from safevlm.network.dialogue import Question, as_turns
from safevlm.network.text_stream import TextStream

if TYPE_CHECKING:
    from torch import Tensor

    from safevlm.checkpoint.checkpoint import Checkpoint
    from safevlm.network.safe_vlm import Begun, JudgeTokens, SafeVLM

__all__ = ["Dtype", "TorchLanguageRunner", "reader_of"]

Dtype: TypeAlias = Literal["float32", "bfloat16", "float16"]


class TorchLanguageRunner(LanguageRunner):
    """Run a checkpoint through ``safevlm.network.safe_vlm``.

    ``model`` is an opened checkpoint or a model that is loaded already; ``device`` is torch's word for one
    (``cpu``, ``cuda``, ``cuda:1``); ``grid`` the (height, width) that images are brought to where the family
    lets one choose (Qwen2.5-VL), which should be the guard bundle's; ``context`` how many tokens a prompt may have with
    its answer, by default the model's own, 4,096 at most where the image leaves room in them. ``parts`` run in place of
    the model's own vision path and guard head: those of the bundle that was made of this very checkpoint.
    """

    runtime = "torch"
    takes_embeddings = True

    def __init__(
        self,
        model: Checkpoint | SafeVLM,
        *,
        device: str = "cpu",
        dtype: Dtype = "float32",
        grid: tuple[int, int] | None = None,
        threads: int | None = None,
        context: int | None = None,
        parts: ExactParts = ExactParts(),
    ) -> None:
        super().__init__()
        if dtype not in get_args(Dtype):
            raise InputError(f"unknown dtype {dtype!r}; allowed: {', '.join(get_args(Dtype))}")
        self.model = model
        self.random_weights = bool(getattr(model, "random_weights", False))  # a loaded model does not say
        self.device = device
        self.dtype = dtype
        self.grid = grid
        self.threads = threads
        self.context = context
        self.parts = parts
        self._turn = Turn(type(self).__name__)
        self._questions: Reader | None = None
        self._vlm: SafeVLM | None = None

    def _activate(self) -> None:
        try:
            import torch
        except ImportError as error:
            raise MissingExtraError("torch", "torch", "answering with torch") from error
        from safevlm.network.device import torch_device
        from safevlm.network.loading import load_safe_vlm
        from safevlm.network.safe_vlm import SafeVLM

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        device = torch_device(self.device)
        dtype = getattr(torch, self.dtype)
        vlm = self.model
        if not isinstance(vlm, SafeVLM):
            vlm = load_safe_vlm(vlm, dtype=dtype, grid=self.grid, device=device)
        self._vlm = vlm.to(device=device, dtype=dtype).eval()
        self.preprocessing = vlm.preprocessing
        self.classes = vlm.classes
        self._questions = reader_of(vlm, self.context)
        self._turn = Turn(type(self).__name__)
        self.parts.activate()

    def _deactivate(self) -> None:
        self._vlm = self._questions = None
        self.parts.deactivate()

    def _reader(self) -> Reader:
        self._check_active()  # outside of a call: nothing of the model is run
        assert self._questions is not None
        return self._questions

    @contextmanager
    def _taken(self) -> Iterator[None]:
        """Hold the model for a call; calls of lanes wait for each other: who judges images, for an answer to end."""
        self._check_active()
        with self._turn.taken():
            yield

    def prefill(
        self, rgb: npt.NDArray[np.uint8], question: Question, embeddings: npt.NDArray[np.float32] | None = None
    ) -> Prefilled:
        """See :meth:`LanguageRunner.prefill`."""
        with self._taken():
            return super().prefill(rgb, question, embeddings)

    def generate(self, handle: Any, max_new_tokens: int) -> str:
        """See :meth:`LanguageRunner.generate`."""
        with self._taken():
            return super().generate(handle, max_new_tokens)

    def stream(self, handle: Any, max_new_tokens: int, writing: Writing | None = None) -> Generator[str, None, None]:
        """See :meth:`LanguageRunner.stream`."""
        with self._taken():
            yield from super().stream(handle, max_new_tokens, writing)

    def judge(self, rgb: npt.NDArray[np.uint8]) -> GuardOutput:
        """Return the exact guard's verdicts on N x H x W x 3 grey levels, a prefill each; nothing is kept of it."""
        import torch

        with self._taken(), self._call():
            vlm, rows = self._held(self._vlm), []
            for image in rgb:
                features = self._features(image, None)
                rows.append(vlm.guard(torch.from_numpy(image[None].copy()).to(self.device), features, self._head))
            probs, logits = (torch.cat(each).float().cpu().numpy() for each in zip(*rows, strict=True))
        return GuardOutput(probs=probs, logits=logits)

    def _features(self, rgb: npt.NDArray[np.uint8], embeddings: npt.NDArray[np.float32] | None) -> Tensor | None:
        """Return an image's features, 1 x T x D: those given, those of the vision part, or None without either."""
        import torch

        if embeddings is None and self.parts.vision is not None:
            embeddings = self.parts.vision.run_file(rgb[None])["embeddings"][0]
        if embeddings is None:
            return None
        return torch.from_numpy(embeddings[None].copy()).to(self.device, getattr(torch, self.dtype))

    def _prefill(
        self, rgb: npt.NDArray[np.uint8], question: Question, embeddings: npt.NDArray[np.float32] | None
    ) -> Prefilled:
        import torch

        vlm = self._held(self._vlm)
        images = torch.from_numpy(rgb[None].copy()).to(self.device)
        begun = vlm.begin(images, [as_turns(question)], self._features(rgb, embeddings), head=self._head)
        return Prefilled(begun.guard_probs[0], [begun], begun.attention_mask.shape[-1])

    @property
    def _head(self) -> JudgeTokens | None:
        """The part that judges hidden states, if there is one, for torch's tensors."""
        head = self.parts.head
        if head is None:
            return None
        import torch

        def judge(hidden: Tensor) -> Tensor:
            return torch.from_numpy(head.run_file(hidden.cpu().numpy())["logits"]).to(hidden.device)

        return judge

    def _generate(self, handle: Any, max_new_tokens: int) -> str:
        return self._held(self._vlm).finish(_begun(handle), max_new_tokens)[0]

    def _stream(self, handle: Any, max_new_tokens: int, writing: Writing) -> Iterator[str]:

        vlm, begun = self._held(self._vlm), _begun(handle)
        limit = max(1, min(max_new_tokens, self._reader().context - begun.attention_mask.shape[-1]))
        decode = vlm.tokenizer.decode
        text = TextStream(lambda ids: str(decode(ids, skip_special_tokens=True)), writing.decoding.stop)
        for (token,) in vlm.decoding_steps(begun, limit, writing.choose):
            assert token is not None  # of one prompt, whose end is the end of the steps
            writing.tokens += 1
            if piece := text.add(token):
                yield piece
            if text.stopped:
                writing.ended = True
                return
        if piece := text.end():
            yield piece
        writing.ended = text.stopped or writing.tokens < limit


def reader_of(vlm: SafeVLM, context: int | None = None) -> Reader:
    """Return how a loaded model reads questions; ``context`` is by default :class:`TorchLanguageRunner`'s."""
    from safevlm.network.prompt_tokens import IMAGE

    tokenizer = vlm.tokenizer
    image_tokens = vlm.prompt_ids("").count(IMAGE)
    own = int(vlm.core.config.get_text_config().max_position_embeddings)
    return Reader(
        chat=vlm.family.chat,
        tokens=lambda text: tokenizer.encode(text, add_special_tokens=False),
        name=lambda token: str(tokenizer.convert_ids_to_tokens(token)),
        control={token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        - {tokenizer.unk_token_id},
        count=lambda turns: len(vlm.prompt_ids(turns)),
        image_tokens=image_tokens,
        longest=max(len(word.encode("utf-8", "replace")) for word in tokenizer.get_vocab()),
        context=min(own, context or max(MOST_CONTEXT, 2 * image_tokens)),
    )


def _begun(handle: Any) -> Begun:
    """Take the prefill out of a handle: decoding extends its cache, so that it is good for one answer."""
    if not isinstance(handle, list) or not handle:
        raise InputError("this prefill was answered already, or belongs to another runner; prefill again")
    begun: Begun = handle.pop()
    return begun
