"""The model list through the official Python SDK."""

from conftest import HELLO, env

CAPABILITIES = {"completion", "vision", "embedding", "tools", "thinking"}


def test_list(client, model):
    models = {m.id: m for m in client.models.list()}
    assert {model, env("OWNLLM_TEXT_MODEL"), env("OWNLLM_SLASH_MODEL")} <= models.keys()
    for m in models.values():
        assert (m.object, m.owned_by) == ("model", "ownllm")
        assert m.created > 0 and m.context_window >= 0 and m.size_mb >= 0 and m.runtime_profile
        assert set(m.capabilities) == CAPABILITIES
    assert models[model].capabilities["tools"] and models[model].capabilities["vision"]
    assert not models[env("OWNLLM_TEXT_MODEL")].capabilities["tools"]


def test_retrieve(client):
    for listed in client.models.list():
        assert client.models.retrieve(listed.id) == listed


def test_id_with_slash_and_colon(client):
    model = env("OWNLLM_SLASH_MODEL")
    assert "/" in model and ":" in model
    assert client.models.retrieve(model).id == model
    assert client.chat.completions.create(model=model, messages=HELLO).model == model
    assert {c.model for c in client.chat.completions.create(model=model, messages=HELLO, stream=True)} == {model}
