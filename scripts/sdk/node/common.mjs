// What the checks of the official Node SDK share. The environment they read is described
// in scripts/README.md; a variable that is missing is a failure, not a skip.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import OpenAI from "openai";

export const HELLO = [{ role: "user", content: "Say hello to the SDK." }];

export function env(name) {
  const value = process.env[name];
  assert.ok(value, `${name} is not set; scripts/README.md says what the checks need`);
  return value;
}

// The error cases: OWNLLM_CASES is a JSON list, or the path of a file that holds one.
export function loadCases() {
  const value = process.env.OWNLLM_CASES || "[]";
  return JSON.parse(value.trimStart().startsWith("[") ? value : readFileSync(value, "utf8"));
}

// An OpenAI client for the stack under test. It tries once, so that a failure shows as it
// is; the checks of retrying say otherwise.
export function connect(options = {}) {
  return new OpenAI({
    baseURL: env("OWNLLM_BASE_URL"),
    apiKey: env("OWNLLM_API_KEY"),
    maxRetries: 0,
    timeout: 60_000,
    ...options,
  });
}

export async function collect(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

export function textOf(chunks) {
  return chunks.flatMap((chunk) => chunk.choices.map((c) => c.delta.content ?? "")).join("");
}

// What every whole stream of chunks keeps: one identity, the role first, nothing of a
// choice after its finish_reason.
export function checkStream(chunks, choices = 1) {
  const identities = new Set(chunks.map((c) => JSON.stringify([c.id, c.created, c.model, c.object])));
  assert.equal(identities.size, 1);
  assert.equal(chunks[0].object, "chat.completion.chunk");
  for (let index = 0; index < choices; index++) {
    const parts = chunks.flatMap((chunk) => chunk.choices.filter((c) => c.index === index));
    assert.equal(parts[0].delta.role, "assistant");
    const last = parts.pop();
    assert.ok(last.finish_reason);
    assert.ok(!last.delta.content && !last.delta.tool_calls);
    assert.ok(parts.every((c) => c.finish_reason === null));
  }
}
