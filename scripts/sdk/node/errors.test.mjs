// Every failure as the official Node SDK shows it.

import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";
import { HELLO, collect, connect, env, loadCases, textOf } from "./common.mjs";

const CLASSES = {
  400: OpenAI.BadRequestError,
  401: OpenAI.AuthenticationError,
  403: OpenAI.PermissionDeniedError,
  404: OpenAI.NotFoundError,
  429: OpenAI.RateLimitError,
};

async function perform(client, kase, call) {
  if (call === "models") return client.models.list();
  if (call === "model") return client.models.retrieve(kase.model);
  const body = { model: kase.model, messages: HELLO, ...kase.body };
  for (const name of kase.omit ?? []) delete body[name];
  if (call === "chat") return client.chat.completions.create(body);
  return collect(await client.chat.completions.create({ ...body, stream: true }));
}

async function failure(promise) {
  try {
    await promise;
  } catch (err) {
    if (err instanceof OpenAI.APIError) return err;
    throw err;
  }
  assert.fail("no error");
}

for (const kase of loadCases()) {
  for (const call of kase.call ? [kase.call] : ["chat", "stream"]) {
    test(`case ${kase.name}, ${call}`, async () => {
      const { expect, retries = 0 } = kase;
      const attempts = [];
      const client = connect({
        apiKey: kase.key,
        ...(kase.base_url && { baseURL: kase.base_url }),
        maxRetries: "retries" in kase ? Math.max(1, retries) : 0,
        fetch: (...args) => (attempts.push(Date.now()), fetch(...args)),
      });
      const err = await failure(perform(client, kase, call));

      assert.deepEqual([err.type, err.code, err.param], [expect.type, expect.code, expect.param ?? null]);
      assert.ok(err.error.message && err.message.includes(err.error.message));
      assert.ok(err.error.message.includes(expect.message ?? ""));
      assert.equal(attempts.length, 1 + retries);
      if (expect.status === 200) {
        // After the status line: an error inside the stream.
        assert.equal(err.status, undefined);
        return;
      }
      assert.equal(err.constructor, CLASSES[expect.status] ?? (expect.status >= 500 ? OpenAI.InternalServerError : OpenAI.APIError));
      assert.equal(err.status, expect.status);
      assert.ok(err.requestID);
      for (const [name, pattern] of Object.entries(expect.headers ?? {})) {
        assert.match(err.headers.get(name) ?? "", new RegExp(pattern), name);
      }
      for (let i = 1; i < attempts.length; i++) {
        assert.ok(attempts[i] - attempts[i - 1] >= 900 * Number(err.headers.get("retry-after")));
      }
    });
  }
}

const client = connect();
const model = env("OWNLLM_MODEL");

// However the backend fails after the first token: what came before is there, and the end
// is an exception, not a short text.
for (const fault of ["error_after", "die_after", "end_after"]) {
  test(`failure in a stream throws: ${fault}`, async () => {
    const chunks = [];
    const demo = { tokens: 8, numbered: true, [fault]: 3 };
    const err = await failure(
      (async () => {
        for await (const c of await client.chat.completions.create({ model, messages: HELLO, stream: true, demo })) chunks.push(c);
      })(),
    );
    assert.ok(!(err instanceof OpenAI.APIConnectionError));
    assert.deepEqual([err.status, err.type, err.code, err.param], [undefined, "internal_error", "backend_error", null]);
    assert.ok(err.message);
    assert.equal(err.message, err.error.message);
    assert.ok(textOf(chunks));
  });
}

for (const fault of [{ status: 500 }, { error_after: 3 }, { die_after: 3 }, { die_after: 0 }]) {
  test(`failure of a reply has a status: ${JSON.stringify(fault)}`, async () => {
    const err = await failure(client.chat.completions.create({ model, messages: HELLO, demo: { tokens: 8, ...fault } }));
    assert.ok(err instanceof OpenAI.InternalServerError);
    assert.deepEqual([err.status, err.code], [502, "backend_error"]);
  });
}

test("failure before the first token has a status", async () => {
  const err = await failure(client.chat.completions.create({ model, messages: HELLO, stream: true, demo: { status: 500 } }));
  assert.deepEqual([err.status, err.code], [502, "backend_error"]);
});
