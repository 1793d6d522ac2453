"""The contract of every language runner: an image and a question in, the exact verdict and an answer out.

A question is a text, or the turns of a dialogue around the one image (``safevlm.network.dialogue``), written as the
family's own chat template writes them. The exact verdict is on the image alone: it is read where the image stands
as the guard was calibrated, behind the prefix of one user turn. Where a guard behind the language model would see other
text before the image (a system text, earlier turns), the runner reads the image behind that prefix first, takes the
verdict there, and reads the dialogue for the answer alone. So no text can change a verdict.

It is asked in two steps so that a gate can stop between them: :meth:`LanguageRunner.prefill` runs what generation
needs anyway and gives the exact guard's verdict where the runtime can read it there, :meth:`LanguageRunner.generate`
goes on from that very prefill. Name law: as in ``runtimes.guard.runner``.

Shapes: H x W pixels, T image tokens, D width of the language model, C classes.
"""

from __future__ import annotations

import abc
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from runtimes.guard.activation import Activated
from runtimes.language.question import Reader, check_turns
from runtimes.language.writing import Decoding, Writing
from safevlm.contract.preprocessing import Preprocessing
from safevlm.errors import InputError, SafeVLMError
from safevlm.machine import memory_advice
from safevlm.network.dialogue import Question, as_turns

__all__ = ["LanguageRunner", "Prefilled"]

SMALLER = "Ask a shorter question, free memory, or start with --dtype bfloat16."


@dataclass(frozen=True, eq=False)
class Prefilled:
    """A prompt that was read, not yet answered.

    ``exact_probs`` is the exact guard's float32 row of C probabilities, None from a runtime that cannot read it.
    ``handle`` is the runner's own; it is good for one ``generate`` and until the next ``prefill``.
    """

    exact_probs: npt.NDArray[np.float32] | None
    handle: Any
    tokens: int = 0
    """Of the prompt, image tokens included; 0 where the runtime does not count them."""


class LanguageRunner(Activated):
    """One language model on one runtime; a context manager that holds its resources while it is entered.

    A subclass fills in :meth:`_activate`, :meth:`_prefill`, :meth:`_generate` and, where it holds something,
    :meth:`_deactivate`. The attributes below are set at the latest when it is activated.
    """

    runtime: ClassVar[str]
    preprocessing: Preprocessing | None = None
    """What brings an image to this runner's size; None when it takes RGB images of any size."""
    classes: tuple[str, ...] | None = None
    """Of the exact verdict, in order; None when the runtime cannot give one."""
    takes_embeddings: bool = False
    """Whether the projector's output can stand in for the image, so that it is not encoded twice."""
    random_weights: bool = False
    """Whether the model is known to be a stand-in, whose answers and verdicts are noise."""

    def check_question(self, question: Question, max_new_tokens: int | None = None) -> None:
        """Raise QuestionError for a question or dialogue that cannot be asked, without touching the model.

        ``max_new_tokens`` must have room in the context, too; None leaves the answer's length to what is left.
        """
        check_turns(self._reader(), as_turns(question), max_new_tokens)

    def _reader(self) -> Reader | None:
        """Return how this runner reads questions, None where that is not known."""
        return None

    def prefill(
        self,
        rgb: npt.NDArray[np.uint8],
        question: Question,
        embeddings: npt.NDArray[np.float32] | None = None,
    ) -> Prefilled:
        """Read an H x W x 3 image (uint8, at :attr:`preprocessing`'s size) and a question or dialogue.

        ``embeddings`` (float32, T x D) is this checkpoint's projector output for the same image, where it is at
        hand and :attr:`takes_embeddings`.

        Raises InputError for another type or shape; SafeVLMError when the runner is not active; BusyError while an
        earlier call runs; QuestionError for turns that the chat template does not take.
        """
        self._check_active()
        self._check_picture(rgb)
        if embeddings is not None and not self.takes_embeddings:
            raise InputError(f"runtime {self.runtime} does not accept image embeddings; give only the image")
        if embeddings is not None and (embeddings.dtype != np.float32 or embeddings.ndim != 2):
            raise InputError(
                f"image embeddings must be float32 of shape T x D, not {embeddings.dtype} {embeddings.shape}"
            )
        with self._call(), memory_advice(SMALLER, SafeVLMError):
            return self._prefill(np.ascontiguousarray(rgb), question, embeddings)

    def generate(self, handle: Any, max_new_tokens: int) -> str:
        """Answer greedily from the handle of a prefill, which is used up; InputError below one token."""
        self._check_active()
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        with self._call(), memory_advice(SMALLER, SafeVLMError):
            return self._generate(handle, max_new_tokens)

    def stream(self, handle: Any, max_new_tokens: int, writing: Writing | None = None) -> Generator[str, None, None]:
        """Answer and yield the pieces of the text as they are written, as ``writing`` says, which is filled in.

        It is one call, which ends when the last piece was taken or the iterator is closed.
        """
        self._check_active()
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        with self._call(), memory_advice(SMALLER, SafeVLMError):
            yield from self._stream(handle, max_new_tokens, writing or Writing())

    @abc.abstractmethod
    def _prefill(
        self, rgb: npt.NDArray[np.uint8], question: Question, embeddings: npt.NDArray[np.float32] | None
    ) -> Prefilled: ...

    @abc.abstractmethod
    def _generate(self, handle: Any, max_new_tokens: int) -> str: ...

    def _stream(self, handle: Any, max_new_tokens: int, writing: Writing) -> Iterator[str]:
        """By default the whole answer is one piece, written greedily."""
        if writing.decoding != Decoding():
            raise InputError(
                f"runtime {self.runtime} always takes the likeliest token. Leave out temperature, top_p, seed and stop."
            )
        writing.ended = True
        yield self._generate(handle, max_new_tokens)

    def _check_picture(self, rgb: npt.NDArray[np.uint8]) -> None:
        size = self.preprocessing
        fits = size is None or rgb.shape[:2] == (size.height, size.width)
        if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3 or not fits:
            wanted = "H x W" if size is None else f"{size.height} x {size.width}"
            raise InputError(
                f"the image must be uint8 of shape {wanted} x 3, not {rgb.dtype} of shape "
                f"{' x '.join(map(str, rgb.shape))}; use Preprocessing.apply"
            )
