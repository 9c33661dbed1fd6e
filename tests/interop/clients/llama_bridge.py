"""A pytest plugin under which llama.cpp's server tests ask a gateway instead of a llama-server.

It changes how they ask, not what they expect: a llama-server has one model and answers to any name, also without `/v1`, and
draws by the seed that it was started with; a gateway sells many models and has no seed of its own. So the model's name,
`/v1` and that seed are put into each request. What their own model says ("Suddenly", "But she couldn't") cannot come out of
another one: there any text will do. Everything else is held to as it stands; what is left out, and why, is in
`llama_excluded.txt`.
"""

import fnmatch
import json
import os
import re
import sys

import pytest

# Their helper for downloads, which nothing here uses.
sys.modules.setdefault("wget", type(sys)("wget"))
MODEL = os.environ["SATGRID_MODEL"]
EMBEDDER = os.environ["SATGRID_EMBEDDER"]
# Endpoints that llama-server has with and without the prefix.
UNDER_V1 = re.compile(r"^(https?://[^/]+)(/(?:chat/completions|completions|models|embeddings|responses|tokenize|detokenize)\b)")
# Expectations of the words of stories260K.
STORY = re.compile(r"Suddenly|But she|felter|going\|bed|Whillicter|^\^ blue")


def asked(path, body):
    """The request as it would be sent to this gateway."""
    if not isinstance(body, dict):
        return body
    body = {**body, "model": EMBEDDER if "embeddings" in path else MODEL}
    if "token" not in path:
        body.setdefault("seed", 42)
    return body


def bridge_requests():
    import requests

    send = requests.Session.request

    def request(self, method, url, **more):
        url = UNDER_V1.sub(r"\1/v1\2", url)
        if method.upper() == "POST" and "json" in more:
            more["json"] = asked(url, more["json"])
        return send(self, method, url, **more)

    requests.Session.request = request


def bridge_openai():
    import httpx

    build = httpx.Client.build_request

    def build_request(self, method, url, **more):
        if method.upper() == "POST" and isinstance(more.get("json"), dict):
            more["json"] = asked(str(url), more["json"])
        elif method.upper() == "POST" and isinstance(more.get("content"), bytes):
            more["content"] = json.dumps(asked(str(url), json.loads(more["content"]))).encode()
        return build(self, method, url, **more)

    httpx.Client.build_request = build_request


def bridge_presets(utils):
    def named(from_preset, name):
        def preset():
            server = from_preset()
            server.model_alias = name
            return server

        return staticmethod(preset)

    utils.ServerPreset.tinyllama2 = named(utils.ServerPreset.tinyllama2, MODEL)
    utils.ServerPreset.bert_bge_small = named(utils.ServerPreset.bert_bge_small, EMBEDDER)
    # Loads models from a hub.
    utils.ServerPreset.load_all = staticmethod(lambda: None)
    match = utils.match_regex

    def match_regex(regex, text):
        return bool(text) if STORY.search(regex) else match(regex, text)

    utils.match_regex = match_regex


def pytest_configure(config):
    sys.path.insert(0, str(config.rootpath))
    import utils

    bridge_requests()
    bridge_openai()
    bridge_presets(utils)


def excluded():
    """Pattern and reason of every test that is left out."""
    here = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(here, "llama_excluded.txt"), encoding="utf-8") as lines:
        for line in lines:
            if line.strip() and not line.startswith("#"):
                pattern, _, reason = line.partition(" : ")
                assert reason.strip(), f"no reason: {line}"
                yield pattern.strip(), reason.strip()


def pytest_collection_modifyitems(config, items):
    rules, used, kept, left_out = list(excluded()), set(), [], []
    for item in items:
        name = item.nodeid.removeprefix("unit/")
        # Brackets are not a pattern here: parameters stand in them.
        hit = next((rule for rule, _ in rules if fnmatch.fnmatchcase(name, rule.replace("[", "[[]"))), None)
        used.add(hit)
        (kept if hit is None else left_out).append(item)
    unused = [rule for rule, _ in rules if rule not in used]
    if unused and not config.option.keyword:
        raise pytest.UsageError(f"llama_excluded.txt names tests that are not there: {json.dumps(unused)}")
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)
