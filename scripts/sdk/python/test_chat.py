"""Chat completions through the official Python SDK, answered by the demo model."""

import asyncio
import base64
import json
import time
import urllib.request

import openai
import pydantic
import pytest

from conftest import HELLO, check_stream, connect, env, text_of

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class City(pydantic.BaseModel):
    name: str
    population: int


def test_reply(client, model):
    reply = client.chat.completions.create(model=model, messages=HELLO)
    choice = reply.choices[0]
    assert (reply.object, reply.model) == ("chat.completion", model)
    assert (choice.message.role, choice.finish_reason) == ("assistant", "stop")
    assert choice.message.content
    assert reply.usage.prompt_tokens > 0 and reply.usage.completion_tokens > 0
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert abs(reply.created - time.time()) < 60


def test_stream_has_the_text_of_the_reply(client, model):
    whole = client.chat.completions.create(model=model, messages=HELLO).choices[0]
    chunks = list(client.chat.completions.create(model=model, messages=HELLO, stream=True))
    check_stream(chunks)
    assert chunks[0].model == model
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason
    assert text_of(chunks) == whole.message.content
    assert all(c.usage is None for c in chunks)


def test_long_stream_is_whole(client, model):
    steer = {"demo": {"tokens": 256, "numbered": True}}
    whole = client.chat.completions.create(model=model, messages=HELLO, extra_body=steer)
    chunks = list(client.chat.completions.create(model=model, messages=HELLO, stream=True, extra_body=steer))
    check_stream(chunks)
    assert whole.usage.completion_tokens == 256
    assert text_of(chunks) == whole.choices[0].message.content == "".join(f" {i}" for i in range(256))


def test_unknown_fields_reach_the_backend(client, model):
    extra = {"chat_template_kwargs": {"enable_thinking": False}, "x_unknown": [1.5, "é", None, {"a": {}}]}
    reply = client.chat.completions.create(
        model=model, messages=HELLO, seed=7, reasoning_effort="low", extra_body=extra | {"demo": {"echo": True}}
    )
    body = json.loads(reply.choices[0].message.content)
    assert body["messages"] == HELLO
    assert {name: body[name] for name in extra} == extra
    assert (body["seed"], body["reasoning_effort"]) == (7, "low")


def test_stream_manager(client, model):
    with client.chat.completions.stream(model=model, messages=HELLO) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        assert stream.get_final_completion().choices[0].message.content == text != ""


def test_async_stream(model):
    async def run():
        async with openai.AsyncOpenAI(base_url=env("OWNLLM_BASE_URL"), api_key=env("OWNLLM_API_KEY")) as client:
            stream = await client.chat.completions.create(model=model, messages=HELLO, stream=True)
            return [chunk async for chunk in stream]

    check_stream(asyncio.run(run()))


def test_usage_chunk(client, model):
    whole = client.chat.completions.create(model=model, messages=HELLO)
    chunks = list(
        client.chat.completions.create(
            model=model, messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
    )
    check_stream(chunks)
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    # The SDK reads a missing usage and a null as the same; the wire format asks for null.
    assert all("usage" in c.model_fields_set and c.usage is None for c in chunks[:-1])


def test_max_tokens(client, model):
    reply = client.chat.completions.create(model=model, messages=HELLO, max_tokens=2)
    assert (reply.choices[0].finish_reason, reply.usage.completion_tokens) == ("length", 2)
    reply = client.chat.completions.create(model=model, messages=HELLO, max_completion_tokens=2)
    assert (reply.choices[0].finish_reason, reply.usage.completion_tokens) == ("length", 2)


def test_tools(client, model):
    reply = client.chat.completions.create(model=model, messages=HELLO, tools=[WEATHER], tool_choice="required")
    choice = reply.choices[0]
    assert choice.finish_reason == "tool_calls"
    call = choice.message.tool_calls[0]
    assert call.id and call.type == "function" and call.function.name == "get_weather"
    assert isinstance(json.loads(call.function.arguments), dict)

    # The answer of the tool goes back, and the model goes on in words.
    answer = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    after = client.chat.completions.create(
        model=model, messages=HELLO + [choice.message, answer], tools=[WEATHER], tool_choice="none"
    )
    assert after.choices[0].message.content


def test_streamed_tools(client, model):
    request = dict(model=model, messages=HELLO, tools=[WEATHER], tool_choice="required")
    whole = client.chat.completions.create(**request).choices[0].message.tool_calls
    chunks = list(client.chat.completions.create(**request, stream=True))
    check_stream(chunks)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    parts = [p for chunk in chunks for p in chunk.choices[0].delta.tool_calls or []]
    for index, call in enumerate(whole):
        mine = [p for p in parts if p.index == index]
        assert mine[0].id and mine[0].function.name == call.function.name
        assert "".join(p.function.arguments or "" for p in mine) == call.function.arguments


def test_several_tool_calls(client, model):
    with client.chat.completions.stream(
        model=model, messages=HELLO, tools=[WEATHER], tool_choice="required", extra_body={"demo": {"tool_calls": 3}}
    ) as stream:
        calls = stream.get_final_completion().choices[0].message.tool_calls
    assert len(calls) == len({call.id for call in calls}) == 3


def test_vision(client, model):
    url = "data:image/png;base64," + base64.b64encode(PIXEL).decode()
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": url}}]
    reply = client.chat.completions.create(model=model, messages=[{"role": "user", "content": parts}])
    assert reply.choices[0].message.content


def test_json_object(client, model):
    reply = client.chat.completions.create(model=model, messages=HELLO, response_format={"type": "json_object"})
    assert isinstance(json.loads(reply.choices[0].message.content), dict)


def test_json_schema_parsed(client, model):
    reply = client.chat.completions.parse(model=model, messages=HELLO, response_format=City)
    assert isinstance(reply.choices[0].message.parsed, City)


def test_json_schema_streamed(client, model):
    with client.chat.completions.stream(model=model, messages=HELLO, response_format=City) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, City)


def test_reasoning(client, model):
    request = dict(model=model, messages=HELLO, extra_body={"demo": {"reasoning_tokens": 5}})
    message = client.chat.completions.create(**request).choices[0].message
    chunks = list(client.chat.completions.create(**request, stream=True))
    check_stream(chunks)
    thought = "".join(getattr(c.choices[0].delta, "reasoning_content", None) or "" for c in chunks)
    assert thought == message.reasoning_content != ""
    assert text_of(chunks) == message.content != ""


def test_several_choices(client, model):
    reply = client.chat.completions.create(model=model, messages=HELLO, n=3)
    assert [c.index for c in reply.choices] == [0, 1, 2]
    check_stream(list(client.chat.completions.create(model=model, messages=HELLO, n=3, stream=True)), choices=3)


def test_logprobs(client, model):
    request = dict(model=model, messages=HELLO, logprobs=True, top_logprobs=2)
    tokens = client.chat.completions.create(**request).choices[0].logprobs.content
    assert tokens and all(t.logprob <= 0 and len(t.top_logprobs) == 2 for t in tokens)
    chunks = list(client.chat.completions.create(**request, stream=True))
    streamed = [t for c in chunks if c.choices and c.choices[0].logprobs for t in c.choices[0].logprobs.content or []]
    assert [t.token for t in streamed] == [t.token for t in tokens]


def test_raw_response(client, model):
    raw = client.chat.completions.with_raw_response.create(model=model, messages=HELLO)
    assert raw.headers["content-type"].startswith("application/json")
    assert raw.headers["x-request-id"] and raw.parse().choices[0].message.content


def test_streaming_response(client, model):
    with client.chat.completions.with_streaming_response.create(model=model, messages=HELLO, stream=True) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith(("data: ", ":")) for line in lines)
    assert lines[-1] == "data: [DONE]"


def aborted() -> int:
    with urllib.request.urlopen(env("OWNLLM_BACKEND_URL") + "/demo/stats", timeout=5) as response:
        return json.load(response)["aborted"]


@pytest.mark.parametrize("streaming", [True, False])
def test_cancel_reaches_the_backend(model, streaming):
    before = aborted()
    slow = {"demo": {"tokens": 1000, "tokens_per_second": 20}}
    if streaming:
        with connect() as client:
            stream = client.chat.completions.create(model=model, messages=HELLO, stream=True, extra_body=slow)
            next(stream)
            stream.close()
    else:
        with connect() as client, pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(model=model, messages=HELLO, extra_body=slow, timeout=3)  # in which it gets there
    deadline = time.monotonic() + 3.5  # two of them for busy cores
    while aborted() == before:
        assert time.monotonic() < deadline, "the backend still works 3.5 s after the client left"
        time.sleep(0.02)
