"""The whole model: a question and an image in, an answer and the guard's verdict out of one prefill.

The modules are transformers' own; this file only puts image features among the token embeddings, which
transformers does by an image token that not every tokenizer has, and reads the guard from the same pass.

Shapes: N images (one question each), H × W pixels, T image tokens, L positions of the padded prompt,
D width of the language model, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from safevlm.checkpoint.architectures import architecture_of
from safevlm.checkpoint.family import Family, TapSource
from safevlm.contract.preprocessing import Preprocessing
from safevlm.errors import InputError
from safevlm.network.dialogue import Question, as_turns
from safevlm.network.head import GuardHead
from safevlm.network.prefill import Answer, Begun, Prefill
from safevlm.network.prompt_tokens import IMAGE, check_ids, dialogue_ids, stop_ids, text_ids
from safevlm.network.reference import image_features

__all__ = ["IMAGE", "Answer", "Begun", "JudgeTokens", "Prefill", "SafeVLM"]

JudgeTokens: TypeAlias = "Callable[[Tensor], Tensor]"
"""A guard head on image tokens: N × T × D, float32, to N × C logits."""


class SafeVLM(nn.Module):
    """A Safe-VLM: ``model`` is transformers' ``…ForConditionalGeneration``, ``head`` the guard's."""

    def __init__(
        self,
        model: nn.Module,
        head: GuardHead,
        *,
        family: Family,
        classes: tuple[str, ...],
        tap_source: TapSource,
        preprocessing: Preprocessing,
        tokenizer: Any,
        stated_ends: frozenset[int] = frozenset(),
    ) -> None:
        super().__init__()
        self.model = model
        self.head = head
        self.family = family
        self.classes = classes
        self.tap_source = tap_source
        self.preprocessing = preprocessing
        self.tokenizer = tokenizer
        self.stated_ends = stated_ends
        config = cast(Any, model).config
        self._architecture = architecture_of(config)
        self._geometry = self._architecture.geometry(config)

    @property
    def core(self) -> Any:
        """transformers' inner model: vision tower, projector and language model, without the output layer."""
        return self.model.model

    # -- inputs -----------------------------------------------------------------------------------------

    def image_features(self, rgb_NHWC: Tensor) -> Tensor:
        """Return the projector's output, N × T × D, of uint8 RGB images; gradients flow."""
        return image_features(self.core, self._geometry, self.preprocessing, rgb_NHWC)

    def prompt_ids(self, question: Question, *, size: tuple[int, int] | None = None) -> list[int]:
        """Return the prompt's token ids, ``IMAGE`` (-200) once for every image token.

        ``size`` is the image's (height, width) in pixels, by default the preprocessing contract's. Raises
        QuestionError for a dialogue that the family's chat template does not take.
        """
        height, width = size or (self.preprocessing.height, self.preprocessing.width)
        tokens = self._geometry.tokens(height, width)
        return dialogue_ids(self.tokenizer, self.family.chat, as_turns(question), tokens)

    def _usual_prefix(self, size: tuple[int, int]) -> list[int]:
        """Return the token ids up to the image's last in a prompt of one user turn: what the guard is calibrated on."""
        ids = self.prompt_ids("", size=size)
        return ids[: len(ids) - ids[::-1].index(IMAGE)]

    def embed(
        self, images_NHWC: Tensor | None, questions: Sequence[Question], features_NTD: Tensor | None = None
    ) -> Prefill:
        """Return the prefill's input for one question an image.

        ``features_NTD`` is what :meth:`image_features` made of the images before (a tower shared with the
        standalone guard): the vision tower does not run again. The images then tell their size and no more;
        without them it is the preprocessing contract's.

        Raises InputError when the numbers of images and questions differ, or features of another shape.
        """
        given = features_NTD if images_NHWC is None else images_NHWC
        if given is None or len(given) != len(questions) or not questions:
            raise InputError(
                f"{0 if given is None else len(given)} images and {len(questions)} questions were given; give one "
                "question per image, and at least one of each. Repeat an image to ask about it twice."
            )
        size = self._size(images_NHWC)
        sequences = [self.prompt_ids(question, size=size) for question in questions]
        if features_NTD is None:
            features_NTD = self.image_features(cast(Tensor, images_NHWC))
        wanted = (len(questions), self._geometry.tokens(*size), self.core.get_input_embeddings().embedding_dim)
        if tuple(features_NTD.shape) != wanted:
            raise InputError(
                f"image features of shape {tuple(features_NTD.shape)} were given; {wanted} (images, image tokens, "
                f"width) is needed for {size[0]}x{size[1]} pixels. Give features of this checkpoint's vision tower."
            )
        usual = self._usual_prefix(size)
        prefill = self.assemble(sequences, features_NTD, size)
        return replace(prefill, usual=all(ids[: len(usual)] == usual for ids in sequences))

    def embed_text(self, questions: Sequence[str]) -> Prefill:
        """Return the prefill's input for at least one question without an image: T is 0."""
        return self.assemble([text_ids(self.tokenizer, self.family.prompt, question) for question in questions])

    def assemble(
        self,
        sequences: Sequence[Sequence[int]],
        features_NTD: Tensor | None = None,
        size: tuple[int, int] = (0, 0),
    ) -> Prefill:
        """Pad token ids on the left and put row i's features where its ``IMAGE`` placeholders stand.

        To continue an answer, give ids that include it. ``size`` is the images' (height, width) in pixels; without
        features the rows are text alone.

        Raises InputError when a row has not T placeholders, or a token that the embedding has no row for.
        """
        longest = max(map(len, sequences))
        table = self.core.get_input_embeddings()
        check_ids(self.tokenizer, sequences, cast(Any, self.model).config.text_config.vocab_size)
        device = table.weight.device if features_NTD is None else features_NTD.device
        padded = [[0] * (longest - len(ids)) + list(ids) for ids in sequences]
        real = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in sequences]
        ids_NL = torch.tensor(padded, device=device)
        attention_NL = torch.tensor(real, device=device)
        image_NL = ids_NL == IMAGE
        words = cast(Tensor, table(ids_NL.clamp(min=0)))
        if features_NTD is None:
            features_NTD = words.new_zeros(len(words), 0, words.shape[-1])
        tokens = features_NTD.shape[1]
        if image_NL.sum(dim=-1).tolist() != [tokens] * len(features_NTD):
            raise InputError(
                f"the prompts hold {image_NL.sum(dim=-1).tolist()} image placeholders, but {len(features_NTD)} images "
                f"of {tokens} image tokens were given. Build the ids with prompt_ids(question, size=...)."
            )
        embeds = words.masked_scatter(image_NL.unsqueeze(-1), features_NTD.to(words.dtype)) if tokens else words
        masks = {"attention_mask": attention_NL}
        if self._architecture.images_see_themselves:
            masks["token_type_ids"] = image_NL.int()
        return Prefill(
            inputs_embeds=embeds,
            position_ids=self._architecture.positions(self.core, attention_NL, image_NL, size),
            masks=masks,
            image_mask=image_NL,
            features=features_NTD,
        )

    # -- forward ----------------------------------------------------------------------------------------

    def language_forward(
        self,
        inputs_embeds_NLD: Tensor,
        masks: dict[str, Tensor],
        position_ids: Tensor,
        past_key_values: DynamicCache | None = None,
    ) -> Tensor:
        """Return the language model's last hidden state, after its final norm, N × L × D; gradients flow.

        ``past_key_values`` is read and extended; ``attention_mask`` then covers what it holds, too.
        """
        output = self.core(
            inputs_embeds=inputs_embeds_NLD,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
            return_dict=True,
            **masks,
        )
        return cast(Tensor, output.last_hidden_state)

    def token_logits(self, hidden_NLD: Tensor) -> Tensor:
        """Return the output layer's N × L × V logits of hidden states."""
        return cast(Tensor, cast(Any, self.model).lm_head(hidden_NLD))

    def guard_logits(self, prefill: Prefill, hidden_NLD: Tensor, head: JudgeTokens | None = None) -> Tensor:
        """Return the guard's N × C logits from a prefill and its last hidden state; gradients flow.

        ``head`` stands in for the checkpoint's own (an engine made of it): N × T × D, float32, to logits.
        """
        if self.tap_source == "projector":
            return self._head_of(prefill.features, head)
        return self._head_of(hidden_NLD[prefill.image_mask].view(prefill.features.shape), head)

    def _head_of(self, tapped_NTD: Tensor, head: JudgeTokens | None = None) -> Tensor:
        if head is not None:
            return head(tapped_NTD.float())
        return cast(Tensor, self.head(tapped_NTD.float().mean(dim=1)))

    @torch.inference_mode()
    def guard(
        self, images_NHWC: Tensor, features_NTD: Tensor | None = None, head: JudgeTokens | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the exact guard's probabilities and logits, N × C, without a question.

        Image tokens see only what stands before them (Gemma-3: and each other), so a tap behind the language
        model needs the prompt up to the image and no more. ``features_NTD`` and ``head`` are as in :meth:`begin`.
        """
        if features_NTD is None:
            features_NTD = self.image_features(images_NHWC)
        logits = self._usual_logits(features_NTD, (images_NHWC.shape[1], images_NHWC.shape[2]), head)
        return torch.softmax(logits, dim=-1), logits

    def _usual_logits(self, features_NTD: Tensor, size: tuple[int, int], head: JudgeTokens | None = None) -> Tensor:
        """Return the guard's N × C logits from the image behind the prompt that the guard is calibrated on."""
        if self.tap_source == "projector":
            return self._head_of(features_NTD, head)
        prefill = self.assemble([self._usual_prefix(size)] * len(features_NTD), features_NTD, size)
        hidden = self.language_forward(prefill.inputs_embeds, prefill.masks, prefill.position_ids)
        return self.guard_logits(prefill, hidden, head)

    @torch.inference_mode()
    def begin(
        self,
        images_NHWC: Tensor | None,
        questions: Sequence[Question],
        features_NTD: Tensor | None = None,
        *,
        head: JudgeTokens | None = None,
    ) -> Begun:
        """Run the one prefill that decoding needs and read the guard from it; :meth:`finish` goes on.

        Arguments and errors are those of :meth:`embed`, ``head`` that of :meth:`guard_logits`. Of the last hidden state
        the image positions are read and the last position is kept: no hidden states of other layers, no second pass.
        Where a system text or earlier turns stand before an image, what a guard behind the language model reads depends
        on them: the verdict then comes from a pass of its own over the image behind the usual prefix, the only one that
        the guard is calibrated on, and nobody talks it round.
        """
        prefill = self.embed(images_NHWC, questions, features_NTD)
        logits = None if prefill.usual else self._usual_logits(prefill.features, self._size(images_NHWC), head)
        hidden, begun = self._begin(prefill)
        probs = torch.softmax(self.guard_logits(prefill, hidden, head) if logits is None else logits, dim=-1)
        return replace(begun, guard_probs=probs.cpu().numpy())

    def _size(self, images_NHWC: Tensor | None) -> tuple[int, int]:
        """Return the images' (height, width) in pixels, without images the preprocessing contract's."""
        contract = (self.preprocessing.height, self.preprocessing.width)
        return contract if images_NHWC is None else (images_NHWC.shape[1], images_NHWC.shape[2])

    @torch.inference_mode()
    def _begin(self, prefill: Prefill) -> tuple[Tensor, Begun]:
        """Return the prefill's last hidden state, and what decoding needs with an empty verdict."""
        cache = DynamicCache(config=self.core.config.get_text_config())
        hidden = self.language_forward(prefill.inputs_embeds, prefill.masks, prefill.position_ids, cache)
        return (
            hidden,
            Begun(
                guard_probs=np.zeros((len(hidden), 0), np.float32),
                last_hidden=hidden[:, -1:].clone(),  # a view would keep all N × L × D alive
                attention_mask=prefill.masks["attention_mask"],
                last_position=prefill.position_ids[..., -1:],
                cache=cache,
            ),
        )

    def generate(self, prefill: Prefill, max_new_tokens: int = 32) -> list[list[int]]:
        """Return the ids that greedy decoding adds to each prompt, without the one that ended it."""
        return self._decode(self._begin(prefill)[1], max_new_tokens)

    def finish(self, begun: Begun, max_new_tokens: int = 32, choose: Callable[[Any], int] | None = None) -> list[str]:
        """Answer the prompts of :meth:`begin`, one pass for every token after the first; ``choose`` as below."""
        written = self._decode(begun, max_new_tokens, choose)
        return [str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in written]

    def answer(
        self,
        images_NHWC: Tensor,
        questions: Sequence[str],
        max_new_tokens: int = 32,
        choose: Callable[[Any], int] | None = None,
    ) -> list[Answer]:
        """Answer one question an image, judging the images in the same prefill; ``choose`` as in decoding_steps."""
        begun = self.begin(images_NHWC, questions)
        texts = self.finish(begun, max_new_tokens, choose)
        return [Answer(text, begun.guard_probs[row]) for row, text in enumerate(texts)]

    def decoding_steps(
        self, begun: Begun, max_new_tokens: int, choose: Callable[[Any], int] | None = None
    ) -> Iterator[list[int | None]]:
        """Yield the N ids that each step adds, None for a prompt whose answer has ended; ends when all have.

        ``choose`` takes a row's V logits (float32, numpy) to its token; by default the likeliest is taken. The cache of
        ``begun`` is extended: it is good for one decoding.
        """
        stops = stop_ids(self.tokenizer, self.family.prompt) | self.stated_ends
        table = self.core.get_input_embeddings()
        hidden_N1D, attention, position = begun.last_hidden, begun.attention_mask, begun.last_position
        open_rows = set(range(len(hidden_N1D)))
        for step in range(max_new_tokens):
            with torch.inference_mode():
                logits_N1V = self.token_logits(hidden_N1D)
                if choose is None:
                    chosen_N1 = logits_N1V.argmax(dim=-1)
                else:
                    rows = [[choose(row)] for row in logits_N1V[:, 0].float().cpu().numpy()]
                    chosen_N1 = torch.tensor(rows, device=hidden_N1D.device)
            ids = chosen_N1[:, 0].tolist()
            open_rows -= {row for row in open_rows if ids[row] in stops}
            if not open_rows:
                return
            yield [token if row in open_rows else None for row, token in enumerate(ids)]
            if step + 1 == max_new_tokens:
                return
            with torch.inference_mode():
                position = position + 1
                attention = torch.cat([attention, torch.ones_like(chosen_N1)], dim=-1)
                hidden_N1D = self.language_forward(
                    table(chosen_N1), {"attention_mask": attention}, position, begun.cache
                )

    def _decode(self, begun: Begun, max_new_tokens: int, choose: Callable[[Any], int] | None = None) -> list[list[int]]:
        """Return the ids that decoding adds to each prompt, without the one that ended it."""
        written: list[list[int]] = [[] for _ in begun.last_hidden]
        for ids in self.decoding_steps(begun, max_new_tokens, choose):
            for row, token in enumerate(ids):
                if token is not None:
                    written[row].append(token)
        return written
