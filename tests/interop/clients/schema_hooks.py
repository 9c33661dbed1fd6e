"""What is changed in a request that schemathesis made from OpenAI's document: the model exists and does what is asked, and the
reply is short."""

import os

import schemathesis

LONGEST = 8


@schemathesis.hook
def before_call(context, case, kwargs):
    body = case.body
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str):
        embeds = case.operation.path == "/embeddings"
        body["model"] = os.environ["SATGRID_EMBEDDER" if embeds else "SATGRID_MODEL"]
        if embeds:
            return
    limits = [name for name in ("max_tokens", "max_completion_tokens", "max_output_tokens") if name in body]
    for name in limits:
        if isinstance(body[name], int) and body[name] > LONGEST:
            body[name] = LONGEST
    if not any(isinstance(body[name], int) for name in limits):
        for prompt, name in (("messages", "max_completion_tokens"), ("input", "max_output_tokens")):
            if prompt in body:
                body[name] = LONGEST
