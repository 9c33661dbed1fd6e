"""LiteLLM against a gateway: litellm_client.py API MODEL."""

import os
import sys
from importlib.metadata import version
from typing import Literal

# Before the import: it would otherwise fetch a list of prices.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
os.environ["LITELLM_TELEMETRY"] = "False"

import litellm  # noqa: E402
from pydantic import BaseModel  # noqa: E402

from checks import NO_END, Checks  # noqa: E402

litellm.suppress_debug_info = True
check = Checks(f"litellm {version('litellm')}")
SAID = [{"role": "user", "content": "the light of the river"}]


class Lamp(BaseModel):
    """Switches a lamp."""

    room: Literal["attic", "cellar"]
    on: bool


def asked(api, model, **more):
    return {"model": f"openai/{model}", "api_base": api, "api_key": "unused", "messages": SAID, **more}


@check
def whole(api, model):
    reply = litellm.completion(**asked(api, model, max_tokens=6, logit_bias=NO_END))
    assert reply.choices[0].message.content and reply.usage.completion_tokens == 6, reply


@check
def stream(api, model):
    wanted = asked(api, model, max_tokens=12, logit_bias=NO_END, stream=True)
    chunks = list(litellm.completion(**wanted, stream_options={"include_usage": True}))
    whole = litellm.stream_chunk_builder(chunks, messages=SAID)
    assert whole.choices[0].message.content and whole.usage.completion_tokens == 12, whole


@check
def tools_and_schema(api, model):
    schema = Lamp.model_json_schema()
    lamp = {"type": "function", "function": {"name": "set_lamp", "parameters": schema}}
    reply = litellm.completion(**asked(api, model, max_tokens=200, tools=[lamp], tool_choice="required"))
    Lamp.model_validate_json(reply.choices[0].message.tool_calls[0].function.arguments)
    reply = litellm.completion(**asked(api, model, max_tokens=200, response_format=Lamp))
    Lamp.model_validate_json(reply.choices[0].message.content)


@check
def errors(api, model):
    for kind, more in ((litellm.NotFoundError, {"model": "openai/no-such"}), (litellm.BadRequestError, {"top_p": 7})):
        try:
            litellm.completion(**{**asked(api, model), **more})
            raise AssertionError(f"accepted: {more}")
        except kind:
            pass


@check
def text(api, model):
    wanted = asked(api, model, prompt="the river", max_tokens=4)
    wanted["model"] = f"text-completion-openai/{model}"
    del wanted["messages"]
    assert litellm.text_completion(**wanted).choices[0].text is not None


if __name__ == "__main__":
    check.run(sys.argv[1], sys.argv[2])
