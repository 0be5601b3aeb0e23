// A client of OwnLLM over NATS, with the official NATS client for Node (@nats-io/transport-node).
//
//     export NATS_URL=nats://127.0.0.1:4222 OWNLLM_API_KEY=sk-ownllm-...
//     node client.mjs chat '{"model":"demo","stream":true,"messages":[{"role":"user","content":"Hi"}]}'
//     node client.mjs submit my-id '{"model":"demo","messages":[{"role":"user","content":"Hi"}]}'
//     node client.mjs result my-id
//     node client.mjs ask whoami
//
// README.md in this folder describes commands, output and exit codes.

import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { connect, createInbox, errors } from "@nats-io/transport-node";

const SILENCE = 15_000; // milliseconds; while a request lives, something comes every second
const DEADLINE = 900_000; // milliseconds, of everything

/** What OwnLLM says is wrong: the answer, with its field "error". */
class Refused extends Error {
  constructor(answer) {
    super(answer.error.message);
    this.answer = answer;
  }
}

/** A reply that isn't whole, or never came. */
class Broken extends Error {}

const dial = (inbox) =>
  connect({
    servers: process.env.NATS_URL ?? "nats://127.0.0.1:4222",
    token: process.env.OWNLLM_API_KEY,
    inboxPrefix: `_INBOX_${inbox}`, // answers go nowhere else
    maxReconnectAttempts: 5,
  });

/** A promise, or a failure if it takes too long. */
async function within(milliseconds, promise) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Broken(`nothing came for ${milliseconds / 1000} s`)), milliseconds);
  });
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}

class Client {
  constructor(nc, key) {
    this.nc = nc;
    this.key = key;
  }

  /** Who has only the secret of a key asks for its id, under the secret's SHA-256. */
  static async connect() {
    let key = process.env.OWNLLM_KEY_ID;
    if (!key) {
      const fingerprint = createHash("sha256").update(process.env.OWNLLM_API_KEY).digest("hex");
      const stranger = new Client(await dial(fingerprint), fingerprint);
      key = (await stranger.ask("whoami")).key_id;
      await stranger.nc.close();
    }
    return new Client(await dial(key), key);
  }

  /** One question, one answer. */
  async ask(operation, payload = "", timeout = SILENCE) {
    let message;
    try {
      message = await this.nc.request(`ownllm.v1.in.${this.key}.${operation}`, payload, { timeout });
    } catch (failure) {
      if (failure instanceof errors.RequestError && failure.isNoResponders()) throw new Broken("no broker is there");
      throw failure;
    }
    const answer = message.json();
    if (answer.kind === "error") throw new Refused(answer);
    return answer;
  }

  /** Yields the answers of a reply, in order, up to its end. */
  async *chat(request) {
    const inbox = createInbox(`_INBOX_${this.key}`);
    const subscription = this.nc.subscribe(inbox);
    try {
      this.nc.publish(`ownllm.v1.in.${this.key}.chat`, request, { reply: inbox });
      const replies = subscription[Symbol.asyncIterator]();
      for (let seq = 1; ; seq++) {
        const { value: message, done } = await within(SILENCE, replies.next());
        if (done) throw new Broken("the connection was closed");
        if (message.data.length === 0 && message.headers?.code === 503) throw new Broken("no broker is there");
        const answer = message.json();
        if (answer.seq !== seq) throw new Broken(`message ${seq} is missing`);
        if (answer.kind === "error") throw new Refused(answer);
        if (answer.kind === "progress") message.respond(); // so the broker knows that we read
        yield answer;
        if (answer.kind === "done") return;
      }
    } finally {
      subscription.unsubscribe(); // whoever stops reading has said enough: the GPU stops, too
    }
  }

  /** Safe to repeat: the same name is the same submission. */
  submit(name, request) {
    return this.ask("submit", JSON.stringify({ id: name, request: JSON.parse(request) }));
  }

  async result(name) {
    for (;;) {
      const answer = await this.ask("result", JSON.stringify({ id: name, wait_seconds: 20 }), 20_000 + SILENCE);
      if (answer.state === "done" || answer.state === "error") return answer;
    }
  }
}

/** Prints a reply as it comes, and cancels it after so many chunks, if that isn't 0. */
async function show(client, request, cancelAfter) {
  let chunks = 0;
  for await (const answer of client.chat(request)) {
    if (answer.kind === "chunk") {
      for (const choice of answer.chunk.choices) process.stdout.write(choice.delta.content ?? "");
      if (++chunks === cancelAfter) await client.ask("cancel", JSON.stringify({ request_id: answer.request_id }));
    } else if (answer.kind === "done") {
      for (const choice of answer.completion?.choices ?? []) process.stdout.write(choice.message.content);
      console.error(JSON.stringify({ request_id: answer.request_id, usage: answer.usage }));
    }
  }
  console.log();
}

async function run(command, ...rest) {
  const payload = (argument) => (argument === "-" ? readFileSync(0) : argument);
  const client = await Client.connect();
  try {
    switch (command) {
      case "chat":
        return await show(client, payload(rest[0]), Number(rest[1] ?? 0));
      case "submit":
        return console.log(JSON.stringify(await client.submit(rest[0], payload(rest[1]))));
      case "result":
        return console.log(JSON.stringify(await client.result(rest[0])));
      case "ask":
        return console.log(JSON.stringify(await client.ask(rest[0], payload(rest[1]))));
      default:
        throw new Error("use chat, submit, result or ask");
    }
  } finally {
    await client.nc.close();
  }
}

try {
  await within(DEADLINE, run(...process.argv.slice(2)));
} catch (failure) {
  const refused = failure instanceof Refused;
  console.error(refused ? JSON.stringify(failure.answer) : `${failure.name}: ${failure.message}`);
  process.exitCode = refused ? 1 : 2;
}
