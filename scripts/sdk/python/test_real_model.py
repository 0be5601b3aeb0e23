"""A real model behind a real llama.cpp server (scripts/realmodel), with the official
Python SDK. Run when OWNLLM_REAL_MODEL names the model."""

import os

import openai
import pytest

from conftest import check_stream, text_of

MODEL = os.environ.get("OWNLLM_REAL_MODEL", "")
pytestmark = pytest.mark.skipif(not MODEL, reason="OWNLLM_REAL_MODEL is not set")

QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
# Greedy, so that a reply and its stream are the same text. cache_prompt is llama.cpp's
# own field: it takes effect only if the body arrives untouched.
GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": 24, "extra_body": {"cache_prompt": False}}


def test_reply(client):
    reply = client.chat.completions.create(messages=QUESTION, **GREEDY)
    assert "Paris" in reply.choices[0].message.content
    assert reply.model == MODEL
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert reply.usage.prompt_tokens > 10 and 0 < reply.usage.completion_tokens <= 24


def test_fields_of_the_backend_pass_through(client):
    for _ in range(2):
        reply = client.chat.completions.create(messages=QUESTION, **GREEDY)
    assert reply.usage.prompt_tokens_details.cached_tokens == 0


def test_stream(client):
    whole = client.chat.completions.create(messages=QUESTION, **GREEDY)
    chunks = list(
        client.chat.completions.create(
            messages=QUESTION, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    check_stream(chunks)
    assert len(chunks) > 4
    assert text_of(chunks) == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_several_turns(client):
    first = client.chat.completions.create(messages=QUESTION, **GREEDY)
    turns = QUESTION + [first.choices[0].message, {"role": "user", "content": "And of Italy?"}]
    second = client.chat.completions.create(messages=turns, **GREEDY)
    assert second.choices[0].message.content
    assert second.usage.prompt_tokens > first.usage.prompt_tokens + first.usage.completion_tokens


def test_length(client):
    reply = client.chat.completions.create(messages=QUESTION, **GREEDY | {"max_tokens": 3})
    assert (reply.choices[0].finish_reason, reply.usage.completion_tokens) == ("length", 3)


@pytest.mark.parametrize("stream", [False, True])
def test_context_overflow(client, stream):
    long = [{"role": "user", "content": "hello world " * 6000}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(messages=long, stream=stream, **GREEDY)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.type == "invalid_request_error"
