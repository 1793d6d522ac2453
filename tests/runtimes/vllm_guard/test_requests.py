"""Images are judged once, in the step that completes their prompt, from the blocks that are theirs then."""

from __future__ import annotations

from runtimes.vllm_guard.requests import Image, Request, Requests, Work


def request(*, computed: int = 0, blocks: tuple[int, ...] = (7, 8), identifier: str = "a", length: int = 50) -> Request:
    image = Image(positions=tuple(range(10, 30)), identifier=identifier)
    return Request(images=(image,), length=length, blocks=list(blocks), computed=computed)


def begun(**given: object) -> Requests:
    requests = Requests()
    requests.begin("r", request(**given))  # type: ignore[arg-type]
    return requests


def judged(work: Work | None) -> Work:
    assert work is not None and work.judge is not None
    return work


def test_a_prompt_in_one_step_is_judged_in_it() -> None:
    work = judged(begun().step("r", 50))
    assert work.judge == (tuple(range(10, 30)),) and work.fresh == tuple(range(10, 30)) and work.blocks == (7, 8)


def test_a_prompt_in_chunks_is_judged_when_the_last_one_is_computed() -> None:
    requests = begun(blocks=(7,))
    first = requests.step("r", 20)
    assert first is not None and first.judge is None and first.fresh == tuple(range(10, 20))
    requests.resume("r", [9], 20, replaced=False)
    second = requests.step("r", 20)
    assert second is not None and second.judge is None and second.fresh == tuple(range(20, 30))
    requests.resume("r", None, 40, replaced=False)
    last = judged(requests.step("r", 10))
    assert last.fresh == () and last.blocks == (7, 9) and last.nonce == first.nonce


def test_steps_that_compute_no_image_ask_nothing_of_the_worker() -> None:
    requests = begun()
    assert requests.step("r", 5) is None
    requests.begin("text", Request(images=(), length=5, blocks=[1], computed=0))
    assert requests.step("text", 5) is None and requests.step("stranger", 5) is None


def test_a_known_prefix_is_not_awaited_again() -> None:
    work = judged(begun(computed=49).step("r", 1))
    assert work.fresh == () and work.judge == (tuple(range(10, 30)),)


def test_what_is_preempted_in_its_prefill_is_judged_from_its_new_blocks() -> None:
    requests = begun()
    requests.step("r", 40)
    requests.resume("r", [3, 4], 0, replaced=True)
    work = judged(requests.step("r", 50))
    assert work.blocks == (3, 4) and work.fresh == tuple(range(10, 30))


def test_what_is_preempted_behind_its_prefill_is_not_judged_again() -> None:
    requests = begun()
    nonce = judged(requests.step("r", 50)).nonce
    requests.resume("r", [3, 4], 0, replaced=True)
    assert requests.step("r", 55) is None
    known = requests.finish("r")
    assert known is not None and known.judged and known.nonce == nonce


def test_what_begins_again_as_a_new_request_keeps_its_name() -> None:
    requests = begun()
    nonce = judged(requests.step("r", 50)).nonce
    requests.begin("r", request(blocks=(3, 4)))
    assert requests.step("r", 50) is None
    known = requests.finish("r")
    assert known is not None and known.nonce == nonce and known.problem is None


def test_other_images_under_the_same_id_are_an_error() -> None:
    requests = begun()
    requests.step("r", 50)
    requests.begin("r", request(identifier="b"))
    assert requests.step("r", 50) is None
    known = requests.finish("r")
    assert known is not None and known.problem is not None


def test_no_two_requests_share_a_name_and_none_is_kept() -> None:
    requests = Requests()
    names = set()
    for _ in range(100):
        requests.begin("r", request())
        known = requests.finish("r")
        assert known is not None
        names.add(known.nonce)
    assert len(names) == 100 and len(requests) == 0 and requests.finish("r") is None
