"""Samples become padded batches in the family's template, with the weights that tokens were promised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from calibration.answers import Answer, own_answers
from calibration.sets.beginnings import Beginnings
from calibration.sets.conversations import Sample
from calibration.streaming.batches import TokenWeights, embed_batches, lay_out, pack_rows
from calibration.streaming.sequential import Activations, LayerStream
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.errors import InputError
from safevlm.network.loading import load_safe_vlm
from tests.safevlm.checkpoint.random_checkpoints import SIZE, TOKENS, Written, write_checkpoint

FAMILIES = (("llava", "original"), ("qwen2_5_vl", "old"), ("gemma3", "hf"))
REFUSAL = "I'm sorry, but I can't assist with that request."


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda pair: pair[0])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    family, layout = request.param
    return write_checkpoint(family, layout, tmp_path_factory.mktemp(family) / "checkpoint")


def samples(written: Written, folder: Path) -> list[Sample]:
    found = []
    for number, picture in enumerate(written.images(3)):
        path = folder / f"{number}.png"
        Image.fromarray(picture.numpy()).save(path)
        found.append(
            Sample(
                kind="safe",
                question="Why? " * (number + 1),
                answer=None,
                image=path,
                name=path.name,
                where=f"#{number}",
            )
        )
    texts = [
        Sample(kind="text", question=text, answer=None, image=None, name="", where=text) for text in ("What?", "Is it?")
    ]
    return [*found, *texts]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_batches_hold_what_the_model_would_make_of_each_sample(written: Written, tmp_path: Path, share: float) -> None:
    asked = samples(written, tmp_path)
    answers = [Answer(text="red"), Answer(text=REFUSAL), None, Answer(text="square"), None]
    checkpoint = open_checkpoint(str(written.folder), tap="language_model")
    packed = []

    def token_ids(model: object) -> list[int]:
        begun = lay_out(model, asked, answers, beginnings=Beginnings(share=share))  # type: ignore[arg-type]
        packed.extend(pack_rows(begun, 120))
        return [token for rows in packed for row in rows for token in row.ids]

    stream = LayerStream(checkpoint, grid=SIZE[written.family], token_ids=token_ids)
    rows = [row for batch in packed for row in batch]
    assert len(rows) == len(asked) and {row.beginning == "usual" for row in rows} == {share == 0}
    if share == 0:
        assert {row.sample.where for row in rows} == {sample.where for sample in asked}
    assert all(len({row.shows_image for row in batch}) == 1 for batch in packed), "pictures apart from text"
    shapes = [(len(batch), max(len(row.ids) for row in batch), checkpoint.hidden_size) for batch in packed]
    whole = load_safe_vlm(checkpoint, grid=SIZE[written.family])
    with Activations(shapes, torch.float32, None) as hidden:
        for number, batch in enumerate(embed_batches(stream, packed, hidden)):
            images = batch.prefill.image_mask.sum(dim=1).tolist()
            weights = TokenWeights(image_share=0.25, refusal_weight=3.0, first_weight=1.0).of_batch(batch)
            by_row = weights.view(batch.prefill.image_mask.shape)
            for place, row in enumerate(batch.rows):
                assert images[place] == (TOKENS[written.family] if row.shows_image else 0)
                if not row.shows_image:
                    expected = whole.assemble([row.ids])
                else:
                    picture = row.sample.picture()
                    assert picture is not None
                    rgb = torch.from_numpy(whole.preprocessing.apply(picture)).unsqueeze(0)
                    expected = whole.assemble([row.ids], whole.image_features(rgb), SIZE[written.family])
                length = len(row.ids)
                assert torch.allclose(hidden[number][place, -length:], expected.inputs_embeds[0], atol=1e-5)
                assert bool((by_row[place, :-length] == 0).all()), "padding counts nothing"
                image = batch.prefill.image_mask[place]
                if row.shows_image:
                    of_image = float(by_row[place, image].sum() / by_row[place].sum())
                    assert of_image == pytest.approx(0.25) or bool((by_row[place, image] == 1).all())
                    assert of_image <= 0.25 + 1e-6
                text = by_row[place, -row.answer_length :] if row.answer_length else torch.tensor([])
                assert bool((text == (3.0 if row.refused else 1.0)).all())
    assert sum(row.refused for row in rows) == 1


def test_first_tokens_and_those_that_the_guard_reads_count_more(written: Written, tmp_path: Path) -> None:
    asked = samples(written, tmp_path)
    checkpoint = open_checkpoint(str(written.folder), tap="language_model")
    model = load_safe_vlm(checkpoint, grid=SIZE[written.family])
    rows = lay_out(model, asked, [None] * len(asked))
    stream = LayerStream(
        checkpoint, grid=SIZE[written.family], token_ids=lambda _: [token for row in rows for token in row.ids]
    )
    packed = pack_rows(rows, 10_000)
    shapes = [(len(batch), max(len(row.ids) for row in batch), checkpoint.hidden_size) for batch in packed]
    plain, more = TokenWeights(first_weight=1.0), TokenWeights(first_weight=8.0, guard_weight=3.0)
    judged = 0
    with Activations(shapes, torch.float32, None) as hidden:
        for batch in embed_batches(stream, packed, hidden):
            real, image = batch.prefill.masks["attention_mask"].bool(), batch.prefill.image_mask
            ratio = (more.of_batch(batch) / plain.of_batch(batch)).view(real.shape)
            for place, row in enumerate(batch.rows):
                first = len(real[place]) - len(row.ids)
                assert float(ratio[place, first]) == pytest.approx(8.0)
                assert bool((ratio[place, image[place]] == (3.0 if row.judged else 1.0)).all())
                others = real[place] & ~image[place]
                others[first] = False
                assert bool((ratio[place, others] == 1).all())
                judged += row.judged
    assert judged == 3, "behind the language model, each image behind the usual prompt"


def test_own_answers_are_what_the_model_says_to_each_alone(written: Written, tmp_path: Path) -> None:
    asked = samples(written, tmp_path)
    checkpoint = open_checkpoint(str(written.folder), tap="language_model")
    found = own_answers(checkpoint, asked, grid=SIZE[written.family], max_new_tokens=5)
    whole = load_safe_vlm(checkpoint, grid=SIZE[written.family])
    for sample, answer in zip(asked, found, strict=True):
        if sample.image is None:
            (ids,) = whole.generate(whole.embed_text([sample.question]), 5)
        else:
            picture = sample.picture()
            assert picture is not None
            rgb = torch.from_numpy(whole.preprocessing.apply(picture)).unsqueeze(0)
            (ids,) = whole.generate(whole.embed(rgb, [sample.question]), 5)
            assert answer.text == whole.answer(rgb, [sample.question], 5)[0].text
        assert answer.ids is not None and list(answer.ids[: len(ids)]) == ids
        assert len(answer.ids) == min(5, len(ids) + 1)


def test_too_long_samples_are_named(written: Written, tmp_path: Path) -> None:
    model = load_safe_vlm(open_checkpoint(str(written.folder), tap="language_model"), grid=SIZE[written.family])
    long = Sample(kind="text", question="Why? " * 600, answer=None, image=None, name="", where="rows.jsonl, line 7")
    with pytest.raises(InputError, match=r"rows.jsonl, line 7: \d+ tokens .* the limit is 512 \(the context"):
        lay_out(model, [long], [None])
    with pytest.raises(InputError, match=r"the limit is 4 \(--max-length"):
        lay_out(model, samples(written, tmp_path)[3:], [None, None], max_length=4)


@pytest.mark.parametrize("share", [0.0, 1.0, float("nan")])
def test_bad_weights_are_refused(share: float) -> None:
    with pytest.raises(InputError, match="--image-share"):
        TokenWeights(image_share=share)
    for name in ("refusal_weight", "guard_weight", "first_weight"):
        with pytest.raises(InputError, match=f"--{name.replace('_', '-')}"):
            TokenWeights(**{name: 0.0 if share == 1 else -share})
