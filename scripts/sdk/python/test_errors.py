"""Every failure as the official Python SDK shows it."""

import re
import time
from itertools import pairwise

import openai
import pytest

from conftest import HELLO, connect, load_cases, text_of

CLASSES = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    429: openai.RateLimitError,
}


def variants() -> list:
    return [
        pytest.param(case, call, id=f"{case['name']}-{call}")
        for case in load_cases()
        for call in ([case["call"]] if "call" in case else ["chat", "stream"])
    ]


def perform(client: openai.OpenAI, case: dict, call: str) -> None:
    if call == "models":
        client.models.list()
    elif call == "model":
        client.models.retrieve(case["model"])
    else:
        body = {"model": case["model"], "messages": HELLO} | case.get("body", {})
        for name in case.get("omit", []):
            body[name] = openai.omit
        known = {name: body.pop(name) for name in ("model", "messages")}
        stream = client.chat.completions.create(**known, extra_body=body, stream=call == "stream")
        if call == "stream":
            list(stream)


@pytest.mark.parametrize("case,call", variants())
def test_case(case, call):
    expect = case["expect"]
    options = {"api_key": case["key"]} | ({"base_url": case["base_url"]} if case.get("base_url") else {})
    attempts = []
    http = openai.DefaultHttpxClient(event_hooks={"request": [lambda _: attempts.append(time.monotonic())]})
    retries = case.get("retries", 0)
    may = max(1, retries) if "retries" in case else 0
    with connect(http_client=http, max_retries=may, **options) as client:
        with pytest.raises(openai.APIError) as caught:
            perform(client, case, call)
    err = caught.value

    assert (err.type, err.code, err.param) == (expect["type"], expect["code"], expect.get("param"))
    assert err.body["message"] and err.body["message"] in err.message
    assert expect.get("message", "") in err.body["message"]
    assert len(attempts) == 1 + retries
    if expect["status"] == 200:  # after the status line: an error inside the stream
        assert not isinstance(err, openai.APIStatusError)
        return
    assert type(err) is CLASSES.get(
        expect["status"], openai.InternalServerError if expect["status"] >= 500 else openai.APIStatusError
    )
    assert err.status_code == expect["status"]
    assert err.request_id
    for name, pattern in expect.get("headers", {}).items():
        assert re.search(pattern, err.response.headers[name]), name
    for earlier, later in pairwise(attempts):
        assert later - earlier >= 0.9 * float(err.response.headers["retry-after"])


@pytest.mark.parametrize("fault", ["error_after", "die_after", "end_after"])
def test_failure_in_a_stream_raises(client, model, fault):
    """However the backend fails after the first token: what came before is there, and
    the end is an exception, not a short text."""
    steer = {"demo": {"tokens": 8, "numbered": True, fault: 3}}
    chunks = []
    with pytest.raises(openai.APIError) as caught:
        for chunk in client.chat.completions.create(model=model, messages=HELLO, stream=True, extra_body=steer):
            chunks.append(chunk)
    err = caught.value
    assert not isinstance(err, openai.APIConnectionError)
    assert (err.type, err.code, err.param) == ("internal_error", "backend_error", None)
    assert err.message and err.message == err.body["message"]
    assert text_of(chunks)


@pytest.mark.parametrize("fault", [{"status": 500}, {"error_after": 3}, {"die_after": 3}, {"die_after": 0}])
def test_failure_of_a_reply_has_a_status(client, model, fault):
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=model, messages=HELLO, extra_body={"demo": {"tokens": 8} | fault})
    assert (caught.value.status_code, caught.value.code) == (502, "backend_error")


def test_failure_before_the_first_token_has_a_status(client, model):
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=model, messages=HELLO, stream=True, extra_body={"demo": {"status": 500}})
    assert (caught.value.status_code, caught.value.code) == (502, "backend_error")
