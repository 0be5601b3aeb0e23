// Chat completions through the official Node SDK, answered by the demo model.

import assert from "node:assert/strict";
import { test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { HELLO, checkStream, collect, connect, env, textOf } from "./common.mjs";

const client = connect();
const model = env("OWNLLM_MODEL");
const create = (request, options) => client.chat.completions.create({ model, messages: HELLO, ...request }, options);
const stream = async (request) => collect(await create({ ...request, stream: true }));

const PIXEL =
  "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg==";
const WEATHER = {
  type: "function",
  function: {
    name: "get_weather",
    description: "The weather of a city.",
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
};
const City = z.object({ name: z.string(), population: z.int() });

test("reply", async () => {
  const reply = await create();
  const [choice] = reply.choices;
  assert.deepEqual([reply.object, reply.model], ["chat.completion", model]);
  assert.deepEqual([choice.message.role, choice.finish_reason], ["assistant", "stop"]);
  assert.ok(choice.message.content);
  assert.ok(reply.usage.prompt_tokens > 0 && reply.usage.completion_tokens > 0);
  assert.equal(reply.usage.total_tokens, reply.usage.prompt_tokens + reply.usage.completion_tokens);
  assert.ok(Math.abs(reply.created - Date.now() / 1000) < 60);
  assert.ok(reply._request_id);
});

test("stream has the text of the reply", async () => {
  const whole = (await create()).choices[0];
  const chunks = await stream();
  checkStream(chunks);
  assert.equal(chunks[0].model, model);
  assert.equal(chunks.at(-1).choices[0].finish_reason, whole.finish_reason);
  assert.equal(textOf(chunks), whole.message.content);
  assert.ok(chunks.every((c) => c.usage == null));
});

test("long stream is whole", async () => {
  const steer = { demo: { tokens: 256, numbered: true } };
  const whole = await create(steer);
  const chunks = await stream(steer);
  checkStream(chunks);
  assert.equal(whole.usage.completion_tokens, 256);
  const numbers = Array.from({ length: 256 }, (_, i) => ` ${i}`).join("");
  assert.deepEqual([textOf(chunks), whole.choices[0].message.content], [numbers, numbers]);
});

test("unknown fields reach the backend", async () => {
  const extra = { chat_template_kwargs: { enable_thinking: false }, x_unknown: [1.5, "é", null, { a: {} }], seed: 7 };
  const reply = await create({ ...extra, demo: { echo: true } });
  const body = JSON.parse(reply.choices[0].message.content);
  assert.deepEqual(body.messages, HELLO);
  for (const name in extra) assert.deepEqual(body[name], extra[name]);
});

test("stream helper", async () => {
  const runner = client.chat.completions.stream({ model, messages: HELLO });
  let text = "";
  runner.on("content", (delta) => (text += delta));
  const final = await runner.finalChatCompletion();
  assert.ok(text);
  assert.equal(final.choices[0].message.content, text);
});

test("usage chunk", async () => {
  const whole = await create();
  const chunks = await stream({ stream_options: { include_usage: true } });
  checkStream(chunks);
  const last = chunks.pop();
  assert.deepEqual(last.choices, []);
  assert.equal(last.usage.total_tokens, whole.usage.total_tokens);
  assert.ok(chunks.every((c) => c.usage === null));
});

test("token limits", async () => {
  for (const limit of ["max_tokens", "max_completion_tokens"]) {
    const reply = await create({ [limit]: 2 });
    assert.deepEqual([reply.choices[0].finish_reason, reply.usage.completion_tokens], ["length", 2]);
  }
});

test("tools", async () => {
  const [choice] = (await create({ tools: [WEATHER], tool_choice: "required" })).choices;
  assert.equal(choice.finish_reason, "tool_calls");
  const [call] = choice.message.tool_calls;
  assert.ok(call.id);
  assert.deepEqual([call.type, call.function.name], ["function", "get_weather"]);
  assert.equal(typeof JSON.parse(call.function.arguments), "object");

  // The answer of the tool goes back, and the model goes on in words.
  const answer = { role: "tool", tool_call_id: call.id, content: "sunny" };
  const after = await create({ messages: [...HELLO, choice.message, answer], tools: [WEATHER], tool_choice: "none" });
  assert.ok(after.choices[0].message.content);
});

test("streamed tools", async () => {
  const request = { tools: [WEATHER], tool_choice: "required" };
  const whole = (await create(request)).choices[0].message.tool_calls;
  const chunks = await stream(request);
  checkStream(chunks);
  assert.equal(chunks.at(-1).choices[0].finish_reason, "tool_calls");
  const parts = chunks.flatMap((c) => c.choices[0].delta.tool_calls ?? []);
  whole.forEach((call, index) => {
    const mine = parts.filter((p) => p.index === index);
    assert.ok(mine[0].id);
    assert.equal(mine[0].function.name, call.function.name);
    assert.equal(mine.map((p) => p.function.arguments ?? "").join(""), call.function.arguments);
  });
});

test("several tool calls", async () => {
  const request = { model, messages: HELLO, tools: [WEATHER], tool_choice: "required", demo: { tool_calls: 3 } };
  const final = await client.chat.completions.stream(request).finalChatCompletion();
  const ids = final.choices[0].message.tool_calls.map((call) => call.id);
  assert.deepEqual([ids.length, new Set(ids).size], [3, 3]);
});

test("vision", async () => {
  const image = { type: "image_url", image_url: { url: `data:image/png;base64,${PIXEL}` } };
  const reply = await create({ messages: [{ role: "user", content: [{ type: "text", text: "What is this?" }, image] }] });
  assert.ok(reply.choices[0].message.content);
});

test("json_object", async () => {
  const reply = await create({ response_format: { type: "json_object" } });
  assert.equal(typeof JSON.parse(reply.choices[0].message.content), "object");
});

test("json_schema, parsed and streamed", async () => {
  const request = { model, messages: HELLO, response_format: zodResponseFormat(City, "city") };
  const parsed = await client.chat.completions.parse(request);
  City.parse(parsed.choices[0].message.parsed);
  const final = await client.chat.completions.stream(request).finalChatCompletion();
  City.parse(final.choices[0].message.parsed);
});

test("reasoning", async () => {
  const request = { demo: { reasoning_tokens: 5 } };
  const { message } = (await create(request)).choices[0];
  const chunks = await stream(request);
  checkStream(chunks);
  assert.ok(message.reasoning_content && message.content);
  assert.equal(chunks.map((c) => c.choices[0].delta.reasoning_content ?? "").join(""), message.reasoning_content);
  assert.equal(textOf(chunks), message.content);
});

test("several choices", async () => {
  const reply = await create({ n: 3 });
  assert.deepEqual(reply.choices.map((c) => c.index), [0, 1, 2]);
  checkStream(await stream({ n: 3 }), 3);
});

test("logprobs", async () => {
  const request = { logprobs: true, top_logprobs: 2 };
  const tokens = (await create(request)).choices[0].logprobs.content;
  assert.ok(tokens.length > 0 && tokens.every((t) => t.logprob <= 0 && t.top_logprobs.length === 2));
  const streamed = (await stream(request)).flatMap((c) => c.choices[0]?.logprobs?.content ?? []);
  assert.deepEqual(streamed.map((t) => t.token), tokens.map((t) => t.token));
});

test("raw response", async () => {
  const { data, response, request_id } = await create().withResponse();
  assert.match(response.headers.get("content-type"), /^application\/json/);
  assert.ok(request_id && data.choices[0].message.content);

  const raw = await create({ stream: true }).asResponse();
  assert.match(raw.headers.get("content-type"), /^text\/event-stream/);
  const lines = (await raw.text()).split("\n").filter(Boolean);
  assert.ok(lines.every((line) => line.startsWith("data: ") || line.startsWith(":")));
  assert.equal(lines.at(-1), "data: [DONE]");
});

async function aborted() {
  return (await (await fetch(env("OWNLLM_BACKEND_URL") + "/demo/stats")).json()).aborted;
}

async function reachesBackend(before) {
  const deadline = Date.now() + 3500; // two seconds of them for busy cores
  while ((await aborted()) === before) {
    assert.ok(Date.now() < deadline, "the backend still works 3.5 s after the client left");
    await sleep(20);
  }
}

const SLOW = { demo: { tokens: 1000, tokens_per_second: 20 } };

test("cancelling a stream reaches the backend", async () => {
  const before = await aborted();
  for await (const _ of await create({ ...SLOW, stream: true })) break;
  await reachesBackend(before);
});

test("cancelling a reply reaches the backend", async () => {
  const before = await aborted();
  // It gets there before.
  await assert.rejects(create(SLOW, { signal: AbortSignal.timeout(3000) }), OpenAI.APIUserAbortError);
  await reachesBackend(before);
});
