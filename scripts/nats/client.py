"""A client of OwnLLM over NATS, with the official NATS client for Python (nats-py).

    export NATS_URL=nats://127.0.0.1:4222 OWNLLM_API_KEY=sk-ownllm-...
    python client.py chat '{"model":"demo","stream":true,"messages":[{"role":"user","content":"Hi"}]}'
    python client.py submit my-id '{"model":"demo","messages":[{"role":"user","content":"Hi"}]}'
    python client.py result my-id
    python client.py ask whoami

README.md in this folder describes commands, output and exit codes.
"""

import asyncio
import hashlib
import json
import os
import sys

import nats
import nats.errors

SILENCE = 15  # seconds; while a request lives, something comes every second
DEADLINE = 900  # seconds, of everything


class Refused(Exception):
    """What OwnLLM says is wrong: the answer, with its field "error"."""


class Broken(Exception):
    """A reply that isn't whole, or never came."""


async def dial(inbox: str) -> nats.NATS:
    failures = []

    async def note(failure: Exception) -> None:
        failures.append(failure)

    try:
        return await nats.connect(
            os.environ.get("NATS_URL", "nats://127.0.0.1:4222"),
            token=os.environ["OWNLLM_API_KEY"],
            inbox_prefix=f"_INBOX_{inbox}",  # answers go nowhere else
            max_reconnect_attempts=5,
            reconnect_time_wait=0.5,
            error_cb=note,
        )
    except nats.errors.NoServersError as failure:  # after several tries, each of which said why
        raise (failures or [failure])[0] from None


class Client:
    def __init__(self, nc: nats.NATS, key: str):
        self.nc, self.key = nc, key

    @classmethod
    async def connect(cls) -> "Client":
        """Who has only the secret of a key asks for its id, under the secret's SHA-256."""
        key = os.environ.get("OWNLLM_KEY_ID")
        if not key:
            fingerprint = hashlib.sha256(os.environ["OWNLLM_API_KEY"].encode()).hexdigest()
            stranger = cls(await dial(fingerprint), fingerprint)
            key = (await stranger.ask("whoami"))["key_id"]
            await stranger.nc.close()
        return cls(await dial(key), key)

    async def ask(self, operation: str, payload: bytes = b"", timeout: float = SILENCE) -> dict:
        """One question, one answer."""
        subject = f"ownllm.v1.in.{self.key}.{operation}"
        try:
            message = await self.nc.request(subject, payload, timeout=timeout)
        except nats.errors.NoRespondersError:
            raise Broken("no broker is there") from None
        except nats.errors.TimeoutError:
            raise Broken(f"no answer within {timeout} s") from None
        answer = json.loads(message.data)
        if answer["kind"] == "error":
            raise Refused(answer)
        return answer

    async def chat(self, request: bytes):
        """Yields the answers of a reply, in order, up to its end."""
        inbox = self.nc.new_inbox()
        replies = await self.nc.subscribe(inbox)
        try:
            await self.nc.publish(f"ownllm.v1.in.{self.key}.chat", request, reply=inbox)
            seq = 0
            while True:
                try:
                    message = await replies.next_msg(timeout=SILENCE)
                except nats.errors.TimeoutError:
                    raise Broken(f"nothing came for {SILENCE} s") from None
                if not message.data and (message.headers or {}).get("Status") == "503":
                    raise Broken("no broker is there")
                answer = json.loads(message.data)
                seq += 1
                if answer["seq"] != seq:
                    raise Broken(f"message {seq} is missing")
                if answer["kind"] == "error":
                    raise Refused(answer)
                if answer["kind"] == "progress":
                    await message.respond(b"")  # so the broker knows that we read
                yield answer
                if answer["kind"] == "done":
                    return
        finally:  # whoever stops reading has said enough: the GPU stops, too
            await replies.unsubscribe()

    async def submit(self, name: str, request: bytes) -> dict:
        """Safe to repeat: the same name is the same submission."""
        return await self.ask("submit", json.dumps({"id": name, "request": json.loads(request)}).encode())

    async def result(self, name: str) -> dict:
        while True:
            question = {"id": name, "wait_seconds": 20}
            answer = await self.ask("result", json.dumps(question).encode(), timeout=20 + SILENCE)
            if answer["state"] in ("done", "error"):
                return answer


async def show(client: Client, request: bytes, cancel_after: int) -> None:
    """Prints a reply as it comes, and cancels it after so many chunks, if that isn't 0."""
    chunks = 0
    async for answer in client.chat(request):
        if answer["kind"] == "chunk":
            chunks += 1
            for choice in answer["chunk"]["choices"]:
                print(choice["delta"].get("content") or "", end="", flush=True)
            if chunks == cancel_after:
                await client.ask("cancel", json.dumps({"request_id": answer["request_id"]}).encode())
        elif answer["kind"] == "done":
            for choice in answer.get("completion", {}).get("choices", []):
                print(choice["message"]["content"], end="")
            print(json.dumps({"request_id": answer["request_id"], "usage": answer["usage"]}), file=sys.stderr)
    print()


async def run(command: str, *arguments: str) -> None:
    def payload(argument: str) -> bytes:
        return sys.stdin.buffer.read() if argument == "-" else argument.encode()

    client = await Client.connect()
    try:
        match command, arguments:
            case "chat", (request,):
                await show(client, payload(request), 0)
            case "chat", (request, cancel_after):
                await show(client, payload(request), int(cancel_after))
            case "submit", (name, request):
                print(json.dumps(await client.submit(name, payload(request))))
            case "result", (name,):
                print(json.dumps(await client.result(name)))
            case "ask", (operation, *rest):
                print(json.dumps(await client.ask(operation, *map(payload, rest))))
            case _:
                raise SystemExit(__doc__)
    finally:
        await client.nc.close()


try:
    asyncio.run(asyncio.wait_for(run(*sys.argv[1:]), DEADLINE))
except Refused as refusal:
    print(json.dumps(refusal.args[0]), file=sys.stderr)
    sys.exit(1)
except (Broken, nats.errors.Error, OSError, TimeoutError) as failure:
    print(f"{type(failure).__name__}: {failure}", file=sys.stderr)
    sys.exit(2)
