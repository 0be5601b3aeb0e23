// The model list through the official Node SDK.

import assert from "node:assert/strict";
import { test } from "node:test";
import { HELLO, collect, connect, env } from "./common.mjs";

const client = connect();

test("list", async () => {
  const models = new Map((await collect(client.models.list())).map((m) => [m.id, m]));
  for (const name of ["OWNLLM_MODEL", "OWNLLM_TEXT_MODEL", "OWNLLM_SLASH_MODEL"]) assert.ok(models.has(env(name)));
  for (const m of models.values()) {
    assert.deepEqual([m.object, m.owned_by], ["model", "ownllm"]);
    assert.ok(m.created > 0 && m.context_window >= 0 && m.size_mb >= 0 && m.runtime_profile);
    assert.deepEqual(Object.keys(m.capabilities).sort(), ["completion", "embedding", "thinking", "tools", "vision"]);
  }
  const { tools, vision } = models.get(env("OWNLLM_MODEL")).capabilities;
  assert.deepEqual([tools, vision], [true, true]);
  assert.equal(models.get(env("OWNLLM_TEXT_MODEL")).capabilities.tools, false);
});

test("retrieve", async () => {
  for await (const listed of client.models.list()) {
    const { _request_id, ...found } = await client.models.retrieve(listed.id);
    assert.deepEqual(found, listed);
  }
});

test("id with slash and colon", async () => {
  const model = env("OWNLLM_SLASH_MODEL");
  assert.match(model, /\/.*:/);
  assert.equal((await client.models.retrieve(model)).id, model);
  assert.equal((await client.chat.completions.create({ model, messages: HELLO })).model, model);
  const chunks = await collect(await client.chat.completions.create({ model, messages: HELLO, stream: true }));
  assert.ok(chunks.every((c) => c.model === model));
});
