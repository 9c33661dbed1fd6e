"""The official OpenAI client against the scripted test service; by hand:

    pip install openai
    cargo run -p satgrid-api --example scripted -- 127.0.0.1:18402
    python api/tests/openai_client.py http://127.0.0.1:18402/v1

Prints one line per check and exits 1 at the first that fails.
"""

import sys
import time

import openai

client = openai.OpenAI(base_url=sys.argv[1], api_key="sk-unused")
HI = [{"role": "user", "content": "hi"}]


def check(what, true, seen=""):
    print(("ok   " if true else "FAIL ") + what, seen)
    if not true:
        sys.exit(1)


def raised(kind, call):
    """The error and how many requests the client made for it."""
    start = time.monotonic()
    try:
        call()
    except kind as error:
        return error, time.monotonic() - start
    check(f"{kind.__name__} is raised", False)


print("openai", openai.__version__)
ids = [model.id for model in client.models.list()]
check("models.list", ids == ["org/tiny", "plain"], ids)
model = client.models.retrieve("org/tiny")
check("models.retrieve, id with a slash", model.id == "org/tiny" and model.msat_per_mtok["output"] == 40_000_000)

reply = client.chat.completions.create(model="org/tiny", messages=HI)
check("chat", reply.choices[0].message.content == "Hello ⚡" and reply.choices[0].finish_reason == "stop")
check("chat: required nulls", reply.choices[0].message.refusal is None and reply.choices[0].logprobs is None)
check("chat: cost", reply.usage.cost_msat == 210 and len(reply.usage.receipt_ids) == 1, reply.usage.cost_msat)
check("chat: x-request-id", bool(reply._request_id), reply._request_id)

stream = client.chat.completions.create(model="two-legs", messages=HI, stream=True, stream_options={"include_usage": True})
chunks = list(stream)
text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
check("stream: text", text == 'a\n"b"c', repr(text))
check("stream: one id", len({c.id for c in chunks}) == 1)
check("stream: role first, reason last", chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "length")
check("stream: usage last and once", chunks[-1].usage.cost_msat == 400 and [c.usage for c in chunks[:-1]] == [None] * 4)
whole = client.chat.completions.create(model="nasty", messages=HI).choices[0].message.content
chunks = client.chat.completions.create(model="nasty", messages=HI, stream=True)
check("stream: line ends, NUL, quotes, emoji", "".join(c.choices[0].delta.content or "" for c in chunks) == whole)
with client.chat.completions.stream(model="org/tiny", messages=HI) as helper:
    check("stream helper", helper.get_final_completion().choices[0].message.content == "Hello ⚡")

legacy = client.completions.create(model="org/tiny", prompt="hi")
check("completions", legacy.choices[0].text == "Hello ⚡" and legacy.object == "text_completion")
legacy = "".join(c.choices[0].text for c in client.completions.create(model="org/tiny", prompt="hi", stream=True))
check("completions, streamed", legacy == "Hello ⚡")

ask = lambda model, **more: lambda: client.chat.completions.create(model=model, messages=HI, **more)
error, took = raised(openai.APIStatusError, ask("no-funds"))
check("402 is an APIStatusError, not retried", error.status_code == 402 and took < 0.4, f"{took:.3f} s")
check("402 metadata", error.code == "insufficient_quota" and error.body["metadata"]["topup"]["bolt11"].startswith("lnbcrt"))
error, took = raised(openai.APIStatusError, ask("no-funds", stream=True))
check("402 for a stream too", error.status_code == 402 and took < 0.4)
error, took = raised(openai.InternalServerError, ask("fails-charged"))
check("502 after a charge is not retried", error.status_code == 502 and took < 0.4, f"{took:.3f} s")
error, took = raised(openai.InternalServerError, ask("fails"))
check("502 without a charge is retried", error.status_code == 502 and took > 0.4, f"{took:.3f} s")
error, _ = raised(openai.NotFoundError, ask("nobody-has-it"))
check("404", error.code == "model_not_found" and error.param == "model", error.message)
error, _ = raised(openai.BadRequestError, ask("too-long"))
check("400 context", error.code == "context_length_exceeded")
error, _ = raised(openai.BadRequestError, lambda: client.chat.completions.create(model="org/tiny", messages=[]))
check("400 empty messages", error.param == "messages", error.message)
error, _ = raised(openai.BadRequestError, ask("org/tiny", n=2))
check("400 n", error.param == "n" and error.code == "unsupported_parameter", error.message)
error, _ = raised(openai.NotFoundError, lambda: client.images.generate(prompt="a cat"))
check("404 images", error.code == "not_found", error.message)
error, _ = raised(openai.APIError, lambda: list(ask("breaks", stream=True)()))
check("an error in mid-stream is raised", "both providers are gone" in error.message and error.body["metadata"]["cost_msat"] == 210)

stream = ask("endless", stream=True)()
next(stream)
stream.close()
check("a stream can be left", True)
keyed = {"Idempotency-Key": f"key-{time.time_ns()}"}
first, again = (ask("org/tiny", extra_headers=keyed)() for _ in range(2))
check("Idempotency-Key replays", first.id == again.id, first.id[:24])
