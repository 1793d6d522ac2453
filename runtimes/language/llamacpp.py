"""llama.cpp through llama-cpp-python's own C bindings: a language model, its projector, and one prompt in memory.

The high-level chat handlers tokenise and prefill by themselves and keep hidden states to themselves; the guard needs
those of the image tokens, out of the very prefill that answers. So this module speaks to ``llama.h`` and ``mtmd.h``.

Shapes: H × W pixels, T image tokens, D width of the language model, V vocabulary.
"""

from __future__ import annotations

import ctypes
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from runtimes.guard.activation import Turn
from runtimes.language.llamacpp_first_patch import FirstPatch
from safevlm.errors import BundleError, InputError, MissingExtraError, SafeVLMError
from safevlm.machine import core_count
from safevlm.terminal.printable import one_line

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["LlamaCpp", "last_error", "llama_libraries", "recent_lines"]

_log = logging.getLogger(__name__)
BATCH = 512
TAPPED_BATCH = 128
"""Image tokens decoded together where their hidden states are read: llama.cpp then computes logits for them, too."""
SEQUENCE = 0
MARKER = b"<__media__>"
SPECIAL_MARGIN = 16
RECENT_LINES = 16
LOG_LEVEL_ERROR = 4
"""``GGML_LOG_LEVEL_ERROR`` of ggml.h; 3 is a warning."""
Floats = npt.NDArray[np.float32]


def llama_libraries() -> tuple[Any, Any]:
    """Return the modules ``llama_cpp.llama_cpp`` and ``llama_cpp.mtmd_cpp``, silent but for errors, which are logged.

    Raises MissingExtraError.
    """
    try:
        llama, mtmd = import_module("llama_cpp.llama_cpp"), import_module("llama_cpp.mtmd_cpp")
    except ImportError as error:
        raise MissingExtraError("llama-cpp-python", "gguf", "running GGUF files") from error
    if not _Quiet.callbacks:
        said = llama.llama_log_callback(_Quiet.say)
        _Quiet.callbacks.append(said)  # C holds no reference
        for module, name in ((llama, "llama_log_set"), (mtmd, "mtmd_log_set"), (mtmd, "mtmd_helper_log_set")):
            getattr(module, name)(said, ctypes.c_void_p(0))
        llama.llama_backend_init()
    return llama, mtmd


def last_error() -> str:
    """Return what llama.cpp last said went wrong."""
    return _Quiet.last_error or "no reason given"


def recent_lines() -> tuple[str, ...]:
    """Return the last lines of llama.cpp's log, oldest first."""
    return tuple(_Quiet.recent)


class _Quiet:
    """llama.cpp's log: errors are kept for the next message, the rest goes to ours at debug level."""

    callbacks: list[Any] = []  # noqa: RUF012  # one for the process, as llama.cpp has one log
    last_error = ""
    recent: deque[str] = deque(maxlen=RECENT_LINES)  # noqa: RUF012

    @staticmethod
    def say(level: int, text: bytes, _: Any) -> None:
        line = text.decode("utf-8", "replace").strip()
        if level == LOG_LEVEL_ERROR and line:
            _Quiet.last_error = line
        if line:
            _Quiet.recent.append(line)
            _log.debug("llama.cpp: %s", one_line(line))


class LlamaCpp:
    """A model and its projector, loaded once while entered; runners share one through ``llamacpp_session``.

    ``context`` is how many tokens a prompt with its answer may have; ``gpu_layers`` are offloaded where the build can.
    ``class_token_last``: the projector file is written for a graph with LLaVA's class token behind the patches.
    One prompt is in memory at a time: ``memory`` is held by the call that reads it and goes on from it, images may be
    encoded meanwhile, one at a time. Raises BundleError when llama.cpp cannot load a file.
    """

    def __init__(
        self,
        model: Path,
        mmproj: Path,
        *,
        image_tokens: int,
        class_token_last: bool = False,
        context: int = 4096,
        threads: int | None = None,
        gpu_layers: int = 0,
    ) -> None:
        self.model_path, self.mmproj_path = model, mmproj
        self.image_tokens = image_tokens
        self.class_token_last = class_token_last
        self.context = context
        self.threads = threads or core_count()
        self.gpu_layers = gpu_layers
        self.position = 0
        """How many positions the prompt in memory takes."""
        self.prefix: Any = None
        """What a runner knows of the prompt up to its image; None where that was not read to its end."""
        self.handle: Any = None
        """What a runner returned for the whole prompt, while an answer can continue from it."""
        self.memory = Turn("llama.cpp's prompt")
        self._llama: Any = None
        self._mtmd: Any = None
        self._model: Any = None
        self._context: Any = None
        self._projector: Any = None
        self._vocabulary: Any = None
        self._first_patch: FirstPatch | None = None
        self._vision = Turn("llama.cpp's vision tower")

    @property
    def end_of_sequence(self) -> int:
        """The token that ends a text."""
        return int(self._llama.llama_vocab_eos(self._vocabulary))

    # -- loading ----------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            self._load()
        except BaseException:
            self.free()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.free()

    def free(self) -> None:
        """Give everything back."""
        if self._projector:
            self._mtmd.mtmd_free(self._projector)
        if self._context:
            self._llama.llama_free(self._context)
        if self._model:
            self._llama.llama_model_free(self._model)
        self._model = self._context = self._projector = None

    def _load(self) -> None:
        self._llama, self._mtmd = llama_libraries()
        llama = self._llama
        parameters = llama.llama_model_default_params()
        parameters.n_gpu_layers = self.gpu_layers
        self._model = llama.llama_model_load_from_file(str(self.model_path).encode(), parameters)
        self._loaded(self._model, self.model_path)
        settings = llama.llama_context_default_params()
        settings.n_ctx = self.context
        settings.n_batch = settings.n_ubatch = max(BATCH, self.image_tokens)  # Gemma-3's image is one micro-batch
        settings.n_threads = settings.n_threads_batch = self.threads
        settings.pooling_type = llama.LLAMA_POOLING_TYPE_NONE
        settings.swa_full = True  # what a sliding window has left would be gone when an image prefix is used again
        self._context = llama.llama_init_from_model(self._model, settings)
        self._loaded(self._context, self.model_path)
        self._vocabulary = llama.llama_model_get_vocab(self._model)
        self.vocab_size = llama.llama_vocab_n_tokens(self._vocabulary)
        self.width = llama.llama_model_n_embd(self._model)
        asked = self._mtmd.mtmd_context_params_default()
        asked.use_gpu, asked.print_timings, asked.warmup = self.gpu_layers > 0, False, False
        asked.n_threads = self.threads
        if self.class_token_last:
            self._first_patch = FirstPatch(self.mmproj_path, llama)
            asked.cb_eval = self._first_patch.callback
        self._projector = self._mtmd.mtmd_init_from_file(str(self.mmproj_path).encode(), self._model, asked)
        self._loaded(self._projector, self.mmproj_path)

    def _loaded(self, what: Any, path: Path) -> None:
        if not what:
            raise BundleError(
                f"{path}: llama.cpp cannot load it: {last_error()}. Write it again with python -m export.gguf, or "
                "install the llama-cpp-python that this project names."
            )

    # -- images -----------------------------------------------------------------------------------------

    def encode(self, rgb_HWC: npt.NDArray[np.uint8]) -> Floats:
        """Return the projector's output, T × D, of an image at the contract's size."""
        with self._image_chunk(rgb_HWC) as chunk, self._vision.taken():
            if self._first_patch is not None:
                self._first_patch.forget()
            if self._mtmd.mtmd_encode_chunk(self._projector, chunk) != 0:
                raise SafeVLMError(f"llama.cpp could not encode the image: {last_error()}")
            given = self._mtmd.mtmd_get_output_embd(self._projector)
            found = np.ctypeslib.as_array(given, shape=(self.image_tokens, self.width)).copy()
            return found if self._first_patch is None else self._first_patch.complete(found)

    @contextmanager
    def _image_chunk(self, rgb_HWC: npt.NDArray[np.uint8]) -> Iterator[Any]:
        """Hold mtmd's chunk of image tokens. What mtmd puts around an image is left out: the prompt has its own."""
        mtmd = self._mtmd
        height, width, _ = rgb_HWC.shape
        pixels = np.ascontiguousarray(rgb_HWC)
        bitmap = mtmd.mtmd_bitmap_init(width, height, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
        chunks = mtmd.mtmd_input_chunks_init()
        try:
            text = mtmd.mtmd_input_text(text=MARKER, text_len=len(MARKER), add_special=False, parse_special=True)
            bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
            with self._vision.taken():
                failed = mtmd.mtmd_tokenize(self._projector, chunks, ctypes.byref(text), bitmaps, 1)
            if failed:
                raise SafeVLMError(f"llama.cpp could not take the image (code {failed}): {last_error()}")
            found = [mtmd.mtmd_input_chunks_get(chunks, at) for at in range(mtmd.mtmd_input_chunks_size(chunks))]
            images = [
                each for each in found if mtmd.mtmd_input_chunk_get_type(each) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE
            ]
            tokens = [int(mtmd.mtmd_input_chunk_get_n_tokens(each)) for each in images]
            if tokens != [self.image_tokens]:
                raise SafeVLMError(
                    f"llama.cpp makes {tokens} tokens of an image of {height}x{width} pixels; the manifest states "
                    f"{self.image_tokens}. The projector file belongs to another model."
                )
            yield images[0]
        finally:
            mtmd.mtmd_input_chunks_free(chunks)
            mtmd.mtmd_bitmap_free(bitmap)

    # -- the prompt in memory ---------------------------------------------------------------------------

    def keep(self, positions: int) -> None:
        """Forget what stands behind so many positions of the prompt."""
        self.handle = None
        if positions == 0:
            self.prefix = None
        memory = self._llama.llama_get_memory(self._context)
        if not self._llama.llama_memory_seq_rm(memory, SEQUENCE, positions, -1):
            raise SafeVLMError("llama.cpp could not remove a part of the prompt")
        self.position = positions

    def tokens(self, text: str) -> list[int]:
        """Tokenise text in which special tokens stand by name."""
        raw = text.encode("utf-8")
        room = len(raw) + SPECIAL_MARGIN
        ids = (self._llama.llama_token * room)()
        count = self._llama.llama_tokenize(self._vocabulary, raw, len(raw), ids, room, False, True)
        if count < 0:
            raise SafeVLMError(f"llama.cpp could not tokenise {len(raw)} bytes of text")
        return list(ids[:count])

    def vocabulary(self) -> tuple[dict[int, str], int]:
        """Return the control tokens' names by id, and the most bytes that one token's name has."""
        llama, unknown = self._llama, self._llama.LLAMA_TOKEN_ATTR_UNKNOWN
        names = [llama.llama_vocab_get_text(self._vocabulary, token) or b"" for token in range(self.vocab_size)]
        control = {
            token: name.decode("utf-8", "replace")
            for token, name in enumerate(names)
            if llama.llama_vocab_is_control(self._vocabulary, token)
            and not llama.llama_vocab_get_attr(self._vocabulary, token) & unknown
        }
        return control, max(map(len, names), default=1)

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, special ones left out."""
        given = (self._llama.llama_token * len(ids))(*ids)
        room = 16 * len(ids) + 64
        for _ in range(2):
            buffer = ctypes.create_string_buffer(room)
            count = self._llama.llama_detokenize(self._vocabulary, given, len(ids), buffer, room, False, False)
            if count >= 0:
                return buffer.raw[:count].decode("utf-8", "replace")
            room = -count
        raise SafeVLMError(f"llama.cpp could not detokenise {len(ids)} tokens")

    def read_text(self, ids: Sequence[int]) -> Floats:
        """Read tokens behind what is in memory and return the last one's V logits; InputError beyond the context."""
        self._check_room(len(ids))
        for start in range(0, len(ids), BATCH):
            piece = ids[start : start + BATCH]
            self._decode_tokens(piece, last=start + BATCH >= len(ids))
        logits = self._llama.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, shape=(self.vocab_size,)).copy()

    def _decode_tokens(self, ids: Sequence[int], *, last: bool) -> None:
        llama = self._llama
        batch = llama.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for at, token in enumerate(ids):
                batch.token[at] = token
                batch.pos[at] = self.position + at
                batch.n_seq_id[at] = 1
                batch.seq_id[at][0] = SEQUENCE
                batch.logits[at] = last and at == len(ids) - 1
            self._checked(llama.llama_decode(self._context, batch))
        finally:
            llama.llama_batch_free(batch)
        self.position += len(ids)

    def read_image(self, rgb_HWC: npt.NDArray[np.uint8], embeddings_TD: Floats, *, tapped: bool) -> Floats | None:
        """Read an image's image tokens behind what is in memory.

        With ``tapped`` return their hidden states after the final norm, T × D, otherwise None. Only the image's size is
        used, since its embeddings are given. Raises InputError beyond the context.
        """
        self._check_room(self.image_tokens)
        embeddings = np.ascontiguousarray(embeddings_TD, np.float32)
        if embeddings.shape != (self.image_tokens, self.width):
            raise InputError(
                f"image embeddings of shape {embeddings.shape} were given; {(self.image_tokens, self.width)} (image "
                "tokens, width) is needed. Give those of this model's projector."
            )
        states: list[Floats] = []
        caught: list[Exception] = []

        def collect(batch: Any, _: Any) -> int:
            try:
                count = batch.contents.n_tokens
                given = self._llama.llama_get_embeddings(self._context)
                states.append(np.ctypeslib.as_array(given, shape=(count, self.width)).copy())
            except Exception as error:  # ctypes would print it and go on
                caught.append(error)
                return 1
            return 0

        self._llama.llama_set_embeddings(self._context, tapped)
        try:
            self._decode_image(rgb_HWC, embeddings, collect if tapped else None)
        finally:
            self._llama.llama_set_embeddings(self._context, False)
            self._llama.llama_set_causal_attn(self._context, True)  # mtmd turns it off for Gemma-3's images
            if caught:
                raise SafeVLMError(f"llama.cpp's hidden states could not be read: {caught[0]}") from caught[0]
        return np.concatenate(states) if tapped else None

    def _decode_image(
        self, rgb_HWC: npt.NDArray[np.uint8], embeddings: Floats, collect: Callable[[Any, Any], int] | None
    ) -> None:
        mtmd = self._mtmd
        reached = self._llama.llama_pos(0)
        kind = mtmd.mtmd_helper_post_decode_callback
        callback = kind() if collect is None else kind(collect)
        with self._image_chunk(rgb_HWC) as chunk:
            whole = mtmd.mtmd_decode_use_non_causal(self._projector, chunk)
            size = max(BATCH, self.image_tokens) if whole or collect is None else TAPPED_BATCH
            given = embeddings.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            self._checked(
                mtmd.mtmd_helper_decode_image_chunk(
                    self._projector,
                    self._context,
                    chunk,
                    given,
                    self.position,
                    SEQUENCE,
                    size,
                    ctypes.byref(reached),
                    callback,
                    None,
                )
            )
        self.position = int(reached.value)

    def _check_room(self, tokens: int) -> None:
        if self.position + tokens > self.context:
            raise InputError(
                f"the prompt has {self.position + tokens} tokens with its image, but the context is {self.context}. "
                "Shorten the question, or open the runner with a larger context."
            )

    def _checked(self, code: int) -> None:
        if code != 0:
            raise SafeVLMError(f"llama.cpp could not continue the prompt (code {code}): {last_error()}")
