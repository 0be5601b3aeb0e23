"""What the checks of the official Python SDK share. The environment they read is
described in scripts/README.md; a variable that is missing is a failure, not a skip."""

import json
import os
import pathlib

import openai
import pytest

HELLO = [{"role": "user", "content": "Say hello to the SDK."}]


def env(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        pytest.fail(f"{name} is not set; scripts/README.md says what the checks need")
    return value


def load_cases() -> list[dict]:
    """The error cases: OWNLLM_CASES is a JSON list, or the path of a file that holds one."""
    value = os.environ.get("OWNLLM_CASES", "")
    if value and not value.lstrip().startswith("["):
        value = pathlib.Path(value).read_text()
    return json.loads(value or "[]")


def connect(**options) -> openai.OpenAI:
    """An OpenAI client for the stack under test. It tries once, so that a failure
    shows as it is; the checks of retrying say otherwise."""
    options = {"base_url": env("OWNLLM_BASE_URL"), "api_key": env("OWNLLM_API_KEY"), "max_retries": 0} | options
    return openai.OpenAI(timeout=60, **options)


def text_of(chunks) -> str:
    return "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices)


def check_stream(chunks, choices: int = 1) -> None:
    """What every whole stream of chunks keeps: one identity, the role first, nothing of a
    choice after its finish_reason."""
    assert len({(c.id, c.created, c.model, c.object) for c in chunks}) == 1
    assert chunks[0].object == "chat.completion.chunk"
    for index in range(choices):
        parts = [c for chunk in chunks for c in chunk.choices if c.index == index]
        assert parts[0].delta.role == "assistant"
        assert parts[-1].finish_reason is not None
        assert all(c.finish_reason is None for c in parts[:-1])
        assert not parts[-1].delta.content and not parts[-1].delta.tool_calls


@pytest.fixture
def client():
    with connect() as c:
        yield c


@pytest.fixture
def model() -> str:
    return env("OWNLLM_MODEL")
