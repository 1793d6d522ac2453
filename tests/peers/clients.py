"""Ask a gateway with a client's own package and print what came back: ``python clients.py PACKAGE URL < images.json``.

The images are data URLs, ``safe`` and ``unsafe``. Printed is a JSON object with what each way of asking gave: a
question with an image (``asked``), the same ``streamed``, a second turn after it with the image in the first
(``second``), and a question with an unsafe image (``refused``: the reason why the answer ended, and its text).
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # the map of prices is not fetched

QUESTION, AGAIN = "Where is the square?", "And its color?"


def content(url: str, **text: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": QUESTION, **text}, {"type": "image_url", "image_url": {"url": url}}]


def litellm(url: str, safe: str, unsafe: str) -> dict[str, Any]:
    import litellm

    litellm.suppress_debug_info = True
    more: dict[str, Any] = {"api_base": f"{url}/v1", "api_key": "sk-none", "num_retries": 0, "timeout": 600}
    more["model"] = "openai/fake"
    first = [{"role": "user", "content": content(safe, cache_control={"type": "ephemeral"})}]
    asked = litellm.completion(messages=first, **more)
    pieces = litellm.completion(messages=first, stream=True, stream_options={"include_usage": True}, **more)
    streamed = "".join(each.choices[0].delta.content or "" for each in pieces if each.choices)
    turns = [*first, asked.choices[0].message, {"role": "user", "content": AGAIN}]
    second = litellm.completion(messages=turns, **more)
    dumped = litellm.completion(messages=[first[0], asked.choices[0].message.model_dump(), turns[2]], **more)
    refused = litellm.completion(messages=[{"role": "user", "content": content(unsafe)}], **more)
    response = litellm.responses(input=[{"role": "user", "content": response_content(safe)}], **more)
    said = [part.text for item in response.output if item.type == "message" for part in item.content]
    return {
        "asked": asked.choices[0].message.content,
        "streamed": streamed,
        "second": second.choices[0].message.content,
        "dumped": dumped.choices[0].message.content,
        "refused": [refused.choices[0].finish_reason, refused.choices[0].message.content],
        "response": "".join(said),
    }


def response_content(url: str) -> list[dict[str, Any]]:
    return [{"type": "input_text", "text": QUESTION}, {"type": "input_image", "image_url": url, "detail": "auto"}]


def langchain(url: str, safe: str, unsafe: str) -> dict[str, Any]:
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
    from langchain_openai import ChatOpenAI

    found: dict[str, Any] = {}
    for name in ("", "response "):
        model = ChatOpenAI(
            model="fake", base_url=f"{url}/v1", api_key="sk-none", max_retries=0, use_responses_api=bool(name)
        )
        first = [SystemMessage("Be short."), HumanMessage(content=content(safe))]
        asked = model.invoke(first)
        pieces = list(model.stream(first))
        kind, _, data = safe.partition(";base64,")
        block = {"type": "image", "base64": data, "mime_type": kind.removeprefix("data:")}
        own = HumanMessage(content=[{"type": "text", "text": QUESTION}, block])
        second = model.invoke([*first, asked, own, AIMessage("Left."), HumanMessage(content=AGAIN)])
        refused = model.invoke([HumanMessage(content=content(unsafe))])
        told = refused.response_metadata
        reason = (told.get("incomplete_details") or {}).get("reason") if name else told["finish_reason"]
        said = refused.additional_kwargs.get("refusal") or refused.content
        found |= {
            f"{name}asked": asked.text,
            f"{name}streamed": "".join(each.text for each in pieces),
            f"{name}second": second.text,
            f"{name}refused": [reason, said],
        }
    return found


def inspect_ai(url: str, safe: str, unsafe: str) -> dict[str, Any]:
    from inspect_ai.model import ChatMessageUser, ContentImage, ContentText, GenerateConfig, get_model

    async def ask() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in ("", "response "):
            model = get_model(
                "openai-api/local/fake",
                base_url=f"{url}/v1",
                api_key="sk-none",
                responses_api=bool(name),
                config=GenerateConfig(max_retries=0, max_tokens=64),
            )
            first = ChatMessageUser(content=[ContentText(text=QUESTION), ContentImage(image=safe)])
            asked = await model.generate([first])
            second = await model.generate([first, asked.choices[0].message, ChatMessageUser(content=AGAIN)])
            unsafe_one = ChatMessageUser(content=[ContentText(text=QUESTION), ContentImage(image=unsafe)])
            refused = await model.generate([unsafe_one])
            found |= {
                f"{name}asked": asked.completion,
                f"{name}second": second.completion,
                f"{name}refused": [refused.stop_reason, refused.completion],
            }
        return found

    return asyncio.run(ask())


def main() -> None:
    package, url = sys.argv[1:]
    images = json.load(sys.stdin)
    ways = {"litellm": litellm, "langchain": langchain, "inspect_ai": inspect_ai}
    print(json.dumps(ways[package](url, images["safe"], images["unsafe"])))


if __name__ == "__main__":
    main()
