// A real model behind a real llama.cpp server (scripts/realmodel), with the official Node
// SDK. Run when OWNLLM_REAL_MODEL names the model.

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import OpenAI from "openai";
import { checkStream, collect, connect, textOf } from "./common.mjs";

const model = process.env.OWNLLM_REAL_MODEL;

describe("real model", { skip: model ? false : "OWNLLM_REAL_MODEL is not set" }, () => {
  const question = [{ role: "user", content: "What is the capital of France? Answer in one short sentence." }];
  // Greedy, so that a reply and its stream are the same text. cache_prompt is llama.cpp's
  // own field: it takes effect only if the body arrives untouched.
  const greedy = { model, messages: question, temperature: 0, max_tokens: 24, cache_prompt: false };
  const create = (request) => connect().chat.completions.create({ ...greedy, ...request });

  test("reply", async () => {
    const reply = await create();
    assert.match(reply.choices[0].message.content, /Paris/);
    assert.equal(reply.model, model);
    assert.ok(["stop", "length"].includes(reply.choices[0].finish_reason));
    assert.ok(reply.usage.prompt_tokens > 10 && reply.usage.completion_tokens > 0 && reply.usage.completion_tokens <= 24);
  });

  test("fields of the backend pass through", async () => {
    await create();
    assert.equal((await create()).usage.prompt_tokens_details.cached_tokens, 0);
  });

  test("stream", async () => {
    const whole = await create();
    const chunks = await collect(await create({ stream: true, stream_options: { include_usage: true } }));
    checkStream(chunks);
    assert.ok(chunks.length > 4);
    assert.equal(textOf(chunks), whole.choices[0].message.content);
    const { usage } = chunks.at(-1);
    assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
    assert.equal(usage.prompt_tokens, whole.usage.prompt_tokens);
  });

  test("several turns", async () => {
    const first = await create();
    const second = await create({ messages: [...question, first.choices[0].message, { role: "user", content: "And of Italy?" }] });
    assert.ok(second.choices[0].message.content);
    assert.ok(second.usage.prompt_tokens > first.usage.prompt_tokens + first.usage.completion_tokens);
  });

  test("length", async () => {
    const reply = await create({ max_tokens: 3 });
    assert.deepEqual([reply.choices[0].finish_reason, reply.usage.completion_tokens], ["length", 3]);
  });

  for (const stream of [false, true]) {
    test(`context overflow, stream ${stream}`, async () => {
      await assert.rejects(create({ stream, messages: [{ role: "user", content: "hello world ".repeat(6000) }] }), (err) => {
        assert.ok(err instanceof OpenAI.BadRequestError);
        assert.deepEqual([err.code, err.type], ["context_length_exceeded", "invalid_request_error"]);
        return true;
      });
    });
  }
});
