"""The official `openai` Python client, 2.x and 3.x, against a gateway: openai_python.py API MODEL."""

import asyncio
import json
import math
import os
import re
import sys
from typing import Literal

import openai
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI
from pydantic import BaseModel

from checks import NO_END, Checks

check = Checks(f"openai {openai.__version__} (Python)")
SAID = [{"role": "user", "content": "the light of the river"}]
LAMP = {
    "type": "function",
    "function": {
        "name": "set_lamp",
        "description": "Switches a lamp",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"room": {"enum": ["attic", "cellar"]}, "on": {"type": "boolean"}},
            "required": ["room", "on"],
            "additionalProperties": False,
        },
    },
}


class Colour(BaseModel):
    colour: Literal["red", "green", "blue"]
    bright: bool


def held_to_lamp(text):
    call = json.loads(text)
    assert set(call) == {"room", "on"} and call["room"] in ("attic", "cellar") and isinstance(call["on"], bool), call


@check
def models_are_listed_and_shown(client, model):
    assert model in [m.id for m in client.models.list()]
    one = client.models.retrieve(model)
    assert one.object == "model" and one.model_extra["sellers"] >= 1, one
    try:
        client.models.retrieve("no-such-model")
        raise AssertionError("an unknown model was shown")
    except NotFoundError as error:
        assert error.code == "model_not_found", error


@check
def a_whole_reply_has_its_price(client, model):
    whole = client.chat.completions.create(
        model=model, messages=SAID, max_completion_tokens=8, seed=3, logit_bias=NO_END
    )
    choice = whole.choices[0]
    assert choice.message.role == "assistant" and choice.finish_reason == "length", whole
    assert choice.message.refusal is None and choice.logprobs is None
    usage = whole.usage
    assert usage.completion_tokens == 8 and usage.total_tokens == usage.prompt_tokens + 8, usage
    assert usage.model_extra["cost_msat"] > 0 and len(usage.model_extra["receipt_ids"]) == 1, usage
    assert usage.prompt_tokens_details.cached_tokens >= 0


@check
def a_stream_ends_with_its_usage(client, model):
    asked = {"model": model, "messages": SAID, "max_tokens": 24, "seed": 3, "logit_bias": NO_END}
    text, usage, finish, chunks = "", None, None, 0
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        chunks += 1
        assert chunk.object == "chat.completion.chunk"
        if chunk.usage:
            assert not chunk.choices and usage is None
            usage = chunk.usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
    assert text and finish == "length" and chunks > 3, (text, finish)
    assert usage.completion_tokens == 24 and usage.model_extra["cost_msat"] > 0, usage
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == text, "streamed or not, the same seed says the same"


@check
def without_being_asked_a_stream_has_no_usage(client, model):
    chunks = list(client.chat.completions.create(model=model, messages=SAID, max_tokens=4, stream=True))
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks)


@check
def several_replies_and_their_logprobs(client, model):
    whole = client.chat.completions.create(
        model=model, messages=SAID, n=3, max_tokens=6, seed=1, logprobs=True, top_logprobs=2, logit_bias=NO_END
    )
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    for choice in whole.choices:
        assert len(choice.logprobs.content) == 6, choice
        for token in choice.logprobs.content:
            assert token.logprob <= 0 and len(token.top_logprobs) == 2
    assert whole.usage.completion_tokens == 18


@check
def a_stop_string_never_leaks(client, model):
    asked = {"model": model, "messages": SAID, "max_tokens": 32, "seed": 3, "logit_bias": NO_END}
    text = client.chat.completions.create(**asked).choices[0].message.content
    # Not where bytes that are no character stand: those cannot be named in a request.
    stop = max(re.findall(r"[a-z ]+", text[4:]), key=len)[:3]
    cut = client.chat.completions.create(**asked, stop=[stop]).choices[0]
    assert cut.finish_reason == "stop" and stop not in cut.message.content, cut
    assert text.startswith(cut.message.content)


@check
def a_schema_is_held(client, model):
    parsed = client.chat.completions.parse(model=model, messages=SAID, response_format=Colour, max_tokens=200)
    assert isinstance(parsed.choices[0].message.parsed, Colour), parsed
    asked = {"model": model, "messages": SAID, "max_tokens": 300}
    loose = client.chat.completions.create(**asked, response_format={"type": "json_object"}, seed=5)
    if loose.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(loose.choices[0].message.content), dict)


@check
def a_schema_that_cannot_be_held_is_named(client, model):
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)y"}}}
    try:
        client.chat.completions.create(
            model=model,
            messages=SAID,
            response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
        )
        raise AssertionError("a look-ahead was accepted")
    except BadRequestError as error:
        assert "properties" in error.param and "pattern" in error.param, error.param


@check
def a_forced_tool_is_called(client, model):
    asked = {"model": model, "messages": SAID, "tools": [LAMP], "max_tokens": 200, "parallel_tool_calls": False}
    for choice in ("required", {"type": "function", "function": {"name": "set_lamp"}}):
        whole = client.chat.completions.create(**asked, tool_choice=choice)
        assert whole.choices[0].finish_reason == "tool_calls", whole
        (call,) = whole.choices[0].message.tool_calls
        assert call.type == "function" and call.function.name == "set_lamp" and call.id
        held_to_lamp(call.function.arguments)
        answered = SAID + [
            whole.choices[0].message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "done"},
        ]
        again = client.chat.completions.create(model=model, messages=answered, tools=[LAMP], max_tokens=4)
        assert again.choices[0].finish_reason in ("length", "stop", "tool_calls")


@check
def a_forced_tool_is_streamed(client, model):
    with client.chat.completions.stream(
        model=model, messages=SAID, tools=[LAMP], tool_choice="required", max_tokens=200, parallel_tool_calls=False
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls
    held_to_lamp(call.function.arguments)
    assert "tool_calls.function.arguments.delta" in kinds, kinds


@check
def text_completions(client, model):
    whole = client.completions.create(model=model, prompt=["the river", "the stone"], max_tokens=5, echo=True, seed=2)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.choices[1].text.startswith("the stone"), whole
    likely = client.completions.create(model=model, prompt="the river", max_tokens=3, logprobs=2, logit_bias=NO_END)
    assert len(likely.choices[0].logprobs.tokens) == 3
    pieces = client.completions.create(model=model, prompt="the river", max_tokens=5, stream=True, seed=2)
    assert "".join(piece.choices[0].text for piece in pieces)


@check
def a_response_whole(client, model):
    whole = client.responses.create(model=model, instructions="be brief", input="the river", max_output_tokens=8)
    assert whole.id.startswith("resp_") and whole.object == "response" and isinstance(whole.output_text, str)
    assert whole.status in ("completed", "incomplete") and whole.error is None and whole.instructions == "be brief"
    assert whole.usage.input_tokens > 0 and 0 < whole.usage.output_tokens <= 8, whole.usage
    assert whole.usage.model_extra["cost_msat"] > 0 and len(whole.usage.model_extra["receipt_ids"]) == 1
    turns = [{"role": "user", "content": "the river"}, whole.output[0].model_dump(), {"role": "user", "content": "and?"}]
    assert client.responses.create(model=model, input=turns, max_output_tokens=2).output


@check
def a_response_as_events(client, model):
    kinds, text, numbers = [], "", []
    with client.responses.stream(model=model, input="the river", max_output_tokens=24) as stream:
        for event in stream:
            kinds.append(event.type)
            numbers.append(event.sequence_number)
            text += event.delta if event.type == "response.output_text.delta" else ""
    assert kinds[:2] == ["response.created", "response.in_progress"], kinds
    assert kinds[-1] in ("response.completed", "response.incomplete") and kinds[-2] == "response.output_item.done"
    assert numbers == list(range(len(numbers))) and text, numbers


@check
def a_response_by_a_schema_and_by_tools(client, model):
    parsed = client.responses.parse(model=model, input="the river", text_format=Colour, max_output_tokens=200)
    assert isinstance(parsed.output_parsed, Colour), parsed
    lamp = {"type": "function", **{name: LAMP["function"][name] for name in ("name", "parameters", "strict")}}
    asked = {"model": model, "tools": [lamp], "max_output_tokens": 200, "parallel_tool_calls": False}
    for choice in ("required", {"type": "function", "name": "set_lamp"}):
        called = client.responses.create(input="the attic", tool_choice=choice, **asked)
        (call,) = called.output
        assert call.type == "function_call" and call.name == "set_lamp" and called.status == "completed", called
        held_to_lamp(call.arguments)
    turns = [{"role": "user", "content": "the attic"}, call.model_dump(exclude_none=True)]
    turns.append({"type": "function_call_output", "call_id": call.call_id, "output": "done"})
    assert client.responses.create(model=model, input=turns, tools=[lamp], max_output_tokens=2).output
    kinds = [event.type for event in client.responses.create(input="x", tool_choice="required", stream=True, **asked)]
    assert "response.function_call_arguments.delta" in kinds and kinds[-1] == "response.completed", kinds


@check
def a_response_is_not_kept(client, model):
    for param, more in (("previous_response_id", {"previous_response_id": "resp_1"}), ("input", {"input": "x " * 9000})):
        try:
            client.responses.create(**{"model": model, "input": "x", **more})
            raise AssertionError(f"accepted: {param}")
        except BadRequestError as error:
            assert error.param == param and error.code, error.body
    try:
        client.responses.retrieve("resp_1")
        raise AssertionError("a response was kept")
    except NotFoundError as error:
        assert "keeps no responses" in error.message, error


@check
def messages_of_every_kind(client, model):
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "the river"}, {"type": "text", "text": "the stone"}]},
        {"role": "assistant", "content": "yes", "name": "me"},
        {"role": "user", "content": "and?", "name": "you"},
    ]
    assert client.chat.completions.create(model=model, messages=messages, max_tokens=2).choices


@check
def refusals_are_the_clients_own_errors(client, model):
    picture = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]
    for expected, param, asked in (
        (BadRequestError, "messages", {"messages": []}),
        (BadRequestError, "temperature", {"messages": SAID, "temperature": 3}),
        (BadRequestError, "messages[0].content[0].type", {"messages": [{"role": "user", "content": picture}]}),
        (BadRequestError, "messages", {"messages": [{"role": "user", "content": "river " * 5000}]}),
        (NotFoundError, "model", {"messages": SAID, "model": "no-such-model"}),
    ):
        try:
            client.chat.completions.create(**{"model": model, **asked})
            raise AssertionError(f"accepted: {param}")
        except expected as error:
            assert error.param == param and error.code and error.request_id, (error.param, error.body)


@check
def headers_and_replays(client, model):
    key = {"Idempotency-Key": f"conformance-{openai.__version__}"}
    asked = {"model": model, "messages": SAID, "max_tokens": 4, "extra_headers": key}
    first = client.chat.completions.with_raw_response.create(**asked)
    second = client.chat.completions.with_raw_response.create(**asked)
    assert first.headers["x-request-id"] and int(first.headers["x-satgrid-cost-msat"]) > 0
    assert second.headers["idempotent-replayed"] == "true" and first.parse().id == second.parse().id
    try:
        client.chat.completions.create(**{**asked, "max_tokens": 5})
        raise AssertionError("a key was taken for another body")
    except openai.UnprocessableEntityError as error:
        assert error.code == "idempotency_key_reused", error


@check
def a_client_that_leaves_early(client, model):
    stream = client.chat.completions.create(
        model=model, messages=SAID, max_tokens=1000, stream=True, logit_bias=NO_END
    )
    for _ in range(3):
        next(stream)
    stream.close()
    assert client.chat.completions.create(model=model, messages=SAID, max_tokens=2).choices


@check
def texts_are_embedded(client, model):
    embedder = os.environ["SATGRID_EMBEDDER"]
    (listed,) = [m for m in client.models.list() if m.id == embedder]
    dimensions = listed.model_extra["embedding_dimensions"]
    texts = ["the light of the river", "a quiet market", "the light of the river"]
    # The client asks for base64 by itself and decodes it; numbers are what one asks for by name.
    for more in ({}, {"encoding_format": "float"}, {"encoding_format": "float", "dimensions": dimensions}):
        answer = client.embeddings.create(model=embedder, input=texts, **more)
        assert [row.index for row in answer.data] == [0, 1, 2] and answer.model == embedder, answer
        rows = [row.embedding for row in answer.data]
        assert all(len(row) == dimensions and abs(math.hypot(*row) - 1) < 1e-4 for row in rows)
        assert rows[0] == rows[2] != rows[1], "the same text has the same row"
        usage = answer.usage
        assert usage.prompt_tokens == usage.total_tokens > 6, usage
        assert usage.model_extra["cost_msat"] > 0 and len(usage.model_extra["receipt_ids"]) == 1, usage
    alone = client.embeddings.create(model=embedder, input=texts[1], encoding_format="float")
    assert alone.data[0].embedding == rows[1], "alone or in a batch"
    by_tokens = client.embeddings.create(model=embedder, input=[[5, 6, 7], [8]], encoding_format="float")
    assert len(by_tokens.data) == 2 and by_tokens.usage.prompt_tokens == 4, by_tokens.usage
    many = client.embeddings.create(model=embedder, input=[f"the river {n}" for n in range(200)])
    assert len(many.data) == 200 and len(many.usage.model_extra["receipt_ids"]) == 1, many.usage


@check
def what_cannot_be_embedded_is_named(client, model):
    embedder = os.environ["SATGRID_EMBEDDER"]
    for param, asked in (
        ("model", {"model": model, "input": "x"}),
        ("input", {"model": embedder, "input": ""}),
        ("input", {"model": embedder, "input": "the river " * 2000}),
        ("dimensions", {"model": embedder, "input": "x", "dimensions": 7}),
    ):
        try:
            client.embeddings.create(**asked)
            raise AssertionError(f"accepted: {asked}")
        except BadRequestError as error:
            assert error.param == param and error.code, error.body
    try:
        client.chat.completions.create(model=embedder, messages=SAID)
        raise AssertionError("a model that embeds wrote")
    except BadRequestError as error:
        assert error.code == "unsupported_model" and "embeddings" in error.message, error.body


@check
def eight_at_once(client, model):
    async def ask(asynchronous, seed):
        reply = await asynchronous.chat.completions.create(
            model=model, messages=SAID, max_tokens=16, seed=seed, logit_bias=NO_END
        )
        return reply.usage.completion_tokens

    async def all_of_them():
        async with AsyncOpenAI(base_url=str(client.base_url), api_key="unused") as asynchronous:
            return await asyncio.gather(*(ask(asynchronous, seed) for seed in range(8)))

    assert asyncio.run(all_of_them()) == [16] * 8


if __name__ == "__main__":
    check.run(OpenAI(base_url=sys.argv[1], api_key="unused", max_retries=0), sys.argv[2])
