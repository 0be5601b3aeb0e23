// A load test of chat completions with k6 (https://k6.io). README.md beside it says how to
// run it. k6 reads a stream as one body, so there is a time to its first byte, which comes
// with the first token, and none between tokens; `ownllm bench` measures those.
import { check } from "k6";
import http from "k6/http";
import { Counter, Rate, Trend } from "k6/metrics";

const base = (__ENV.OPENAI_BASE_URL || "http://127.0.0.1:9191/v1").replace(/\/$/, "");
const key = __ENV.OPENAI_API_KEY || "";
const model = __ENV.MODEL || "demo";
const stream = (__ENV.STREAM || "true") === "true";
const maxTokens = Number(__ENV.MAX_TOKENS || 64);
const duration = __ENV.DURATION || "10s";
// The demo model numbers its tokens on demand, so that each can be looked for.
const verify = (__ENV.VERIFY || String(model === "demo")) === "true";

const firstByte = new Trend("first_byte", true);
const tokens = new Counter("tokens");
const torn = new Rate("torn_replies");

// With RATE an open loop, in which requests are sent whether or not earlier ones are done;
// else a closed one of VUS clients.
const scenario = __ENV.RATE
  ? { executor: "constant-arrival-rate", rate: Number(__ENV.RATE), timeUnit: "1s", preAllocatedVUs: 50, maxVUs: 2000 }
  : { executor: "constant-vus", vus: Number(__ENV.VUS || 8) };

export const options = {
  scenarios: { chat: { ...scenario, duration, gracefulStop: "30s" } },
  thresholds: { checks: ["rate==1"], torn_replies: ["rate==0"] },
  summaryTrendStats: ["avg", "med", "p(90)", "p(99)", "p(99.9)", "max"],
};

// read returns what a reply says, and whether it is whole.
function read(body) {
  if (!stream) {
    const { choices, usage } = JSON.parse(body);
    return { text: choices[0].message.content, finished: Boolean(choices[0].finish_reason), usage, done: true };
  }
  const reply = { text: "", finished: false, usage: null, done: false, error: null };
  for (const line of body.split("\n")) {
    if (!line.startsWith("data:")) continue;
    const data = line.slice(5).trim();
    if (data === "[DONE]") {
      reply.done = true;
      continue;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) reply.error = chunk.error;
    if (chunk.usage) reply.usage = chunk.usage;
    for (const choice of chunk.choices || []) {
      reply.text += choice.delta.content || "";
      reply.finished = reply.finished || Boolean(choice.finish_reason);
    }
  }
  return reply;
}

const wanted = Array.from({ length: maxTokens }, (_, i) => ` ${i}`).join("");

export default function () {
  const body = {
    model,
    stream,
    max_tokens: maxTokens,
    messages: [{ role: "user", content: `Request ${__VU}-${__ITER}: count, please.` }],
  };
  if (stream) body.stream_options = { include_usage: true };
  if (verify) body.demo = { numbered: true, tokens: maxTokens };
  const response = http.post(`${base}/chat/completions`, JSON.stringify(body), {
    headers: { "Content-Type": "application/json", Authorization: `Bearer ${key}` },
    timeout: "120s",
  });
  if (!check(response, { "status is 200": (r) => r.status === 200 })) return;
  let reply;
  try {
    reply = read(response.body);
  } catch (e) {
    torn.add(true); // something in it isn't JSON
    return;
  }
  firstByte.add(response.timings.waiting);
  if (reply.usage) tokens.add(reply.usage.completion_tokens);
  if (!check(reply, { "no error in the stream": (r) => !r.error })) return;
  torn.add(!reply.finished || !reply.done || (verify && reply.text !== wanted));
}
