"""LangChain's OpenAI package against a gateway: langchain_client.py API MODEL."""

import json
import os
import sys
from importlib.metadata import version
from typing import Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

from checks import NO_END, Checks

check = Checks(f"langchain-openai {version('langchain-openai')}")


class Lamp(BaseModel):
    """Switches a lamp."""

    room: Literal["attic", "cellar"]
    on: bool


@tool
def set_lamp(room: Literal["attic", "cellar"], on: bool) -> str:
    """Switches a lamp."""
    return f"{room}: {on}"


def chat(api, model, **more):
    return ChatOpenAI(base_url=api, api_key="unused", model=model, max_retries=0, max_tokens=200, **more)


@check
def invoke_and_stream(api, model):
    llm = chat(api, model, seed=3)
    reply = llm.bind(logit_bias=NO_END, max_tokens=8).invoke([HumanMessage("the light of the river")])
    assert reply.content and reply.usage_metadata["output_tokens"] == 8, reply
    pieces = list(llm.bind(max_tokens=8).stream("the light of the river"))
    assert len(pieces) > 1


@check
def tools(api, model):
    bound = chat(api, model).bind_tools([set_lamp], tool_choice="set_lamp", parallel_tool_calls=False)
    reply = bound.invoke("the attic")
    (call,) = reply.tool_calls
    assert call["name"] == "set_lamp" and call["args"]["room"] in ("attic", "cellar"), reply
    answered = [HumanMessage("the attic"), reply, ToolMessage(set_lamp.invoke(call["args"]), tool_call_id=call["id"])]
    assert chat(api, model).bind(max_tokens=3).invoke(answered) is not None
    gathered = None
    for piece in bound.stream("the attic"):
        gathered = piece if gathered is None else gathered + piece
    assert gathered.tool_calls[0]["name"] == "set_lamp", gathered


@check
def structured_output(api, model):
    for method in ("json_schema", "function_calling"):
        lamp = chat(api, model).with_structured_output(Lamp, method=method).invoke("the attic")
        assert isinstance(lamp, Lamp), (method, lamp)


@check
def responses(api, model):
    llm = chat(api, model, use_responses_api=True, output_version="responses/v1")
    reply = llm.bind(max_tokens=8).invoke("the river")
    assert reply.usage_metadata["output_tokens"] > 0, reply
    assert list(llm.bind(max_tokens=8).stream("the river"))
    lamp = llm.with_structured_output(Lamp, method="json_schema").invoke("the attic")
    assert isinstance(lamp, Lamp), lamp


@check
def batch(api, model):
    replies = chat(api, model).bind(max_tokens=4).batch(["the river"] * 4)
    assert len(replies) == 4 and all(json.dumps(reply.response_metadata) for reply in replies)


@check
def embeddings(api, model):
    # By default it tokenises by the names of OpenAI's own models; here texts are sent.
    embedder = OpenAIEmbeddings(
        base_url=api, api_key="unused", model=os.environ["SATGRID_EMBEDDER"], check_embedding_ctx_length=False
    )
    rows = embedder.embed_documents([f"the river {n}" for n in range(30)])
    assert len(rows) == 30 and len({len(row) for row in rows}) == 1, [len(row) for row in rows]
    assert embedder.embed_query("the river 7") == rows[7]


if __name__ == "__main__":
    check.run(sys.argv[1], sys.argv[2])
