"""Serve the classifier over HTTP with Cog's own server, the one that runs in the container, but without Docker.

    python serve.py --port 5000
    curl http://127.0.0.1:5000/predictions -H "Content-Type: application/json" \\
        -d '{"input": {"image": "https://example.com/dog.jpg"}}'

Cog's server checks the inputs of a request against .cog/openapi_schema.json, and without that file takes anything. Only
`cog build`, which needs Docker, would write it, so it is written here first.

It takes one request at a time. With --slots 16 it takes sixteen, which go through the network together: for GPUs (see
predict_batched.py).

Should the server end without being asked to (its worker may have died, see serving/watchdog.py), it is started again.
SIGTERM and SIGINT let the request under way finish.
"""

import argparse
import inspect
import json
import os
import pathlib
import socket
import sys
import types
import typing

from cog import BaseRunner, Path

from serving.supervisor import supervise

ROOT = pathlib.Path(__file__).resolve().parent
SCHEMA_FILE = ROOT / ".cog" / "openapi_schema.json"
MAX_SLOTS = 256  # each holds a picture of up to 100 MB

# Python's types and Input()'s limits, and what each is in JSON Schema. The forms are those of `cog build`.
JSON_TYPES = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    Path: {"type": "string", "format": "uri"},
}
JSON_LIMITS = {
    "ge": "minimum",
    "le": "maximum",
    "min_length": "minLength",
    "max_length": "maxLength",
    "regex": "pattern",
    "accept": "x-cog-accept",
}


def main(arguments: list[str] | None = None) -> None:
    """Check the arguments, write the description and run Cog's server."""
    parser = _Parser(prog="serve.py", description="Serve the classifier with Cog's own HTTP server.")
    parser.add_argument("--port", type=_port, default=5000, help="default: 5000")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1; 0.0.0.0 also serves other machines")
    parser.add_argument("--slots", type=_slots, default=1, help="requests at a time; default: 1")
    parser.add_argument("--write-schema-only", action="store_true", help=f"write {SCHEMA_FILE} and stop")
    options = parser.parse_args(arguments)
    try:
        if options.write_schema_only:
            return write_schema()
        address = free_address(options.host, options.port)
        write_schema()
    except OSError as error:
        sys.exit(f"serve.py: {error}")
    print(f"Cog's server will answer at http://{address}:{options.port}/predictions", flush=True)
    sys.exit(run_server(address, options.port, options.slots))


def free_address(host: str, port: int) -> str:
    """The IPv4 address of ``host``, where ``port`` is free. Raises OSError with one line for the user."""
    # Cog's server takes addresses only, and reports a port in use with a traceback.
    try:
        address = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)[0][4]
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            probe.bind(address)
    except OSError as error:
        reason = f"port {port} of {host} cannot be used ({error.strerror})"
        raise OSError(f"{reason}; choose another --port or --host") from error
    return address[0]


def run_server(address: str, port: int, slots: int = 1) -> int:
    """Cog's server, for as long as it is wanted. Gives its exit status."""
    environment = os.environ | {
        "PORT": str(port),
        "COG_PREDICT_TYPE_STUB": "predict.py:Predictor" if slots == 1 else "predict_batched.py:Predictor",
        "COG_MAX_CONCURRENCY": str(slots),
        # The server starts its worker as "python": it must be this one.
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]),
    }
    for name in ("COG_WEIGHTS", "CONVMIXER_CACHE"):
        if environment.get(name):  # the user's path starts from the user's folder
            environment[name] = os.path.abspath(os.path.expanduser(environment[name]))
    # ROOT is where the server looks for predict.py and the description.
    return supervise([sys.executable, "-m", "cog.server.http", "--host", address], ROOT, environment)


def write_schema() -> None:
    """Write SCHEMA_FILE. Servers that are running have read theirs."""
    from predict import Predictor  # late: a mistyped option should not wait for it

    SCHEMA_FILE.parent.mkdir(exist_ok=True)
    complete = SCHEMA_FILE.with_suffix(f".{os.getpid()}.tmp")  # a server that is starting may read at any moment
    complete.write_text(json.dumps(openapi_schema(Predictor), indent=2))
    complete.replace(SCHEMA_FILE)


def openapi_schema(predictor: type[BaseRunner]) -> dict:
    """The OpenAPI 3.0 description of the API that Cog's server makes of ``predictor``."""
    inputs, choices = input_schema(predictor.run)
    output = json_type(typing.get_type_hints(predictor.run)["return"])
    text, time = {"type": "string"}, {"type": "string", "format": "date-time"}
    request = {"id": text, "input": _reference("Input")}
    response = request | {
        "output": _reference("Output"),
        "status": _reference("Status"),
        "error": text,
        "logs": text,
        "metrics": {"type": "object"},
        "created_at": time,
        "started_at": time,
        "completed_at": time,
    }
    problem = {"loc": {"type": "array", "items": text}, "msg": text, "type": text}
    schemas = {
        "Input": {"title": "Input"} | inputs,
        "Output": {"title": "Output"} | output,
        **choices,
        "Status": {"title": "Status", "enum": ["starting", "processing", "succeeded", "canceled", "failed"]} | text,
        "PredictionRequest": {"title": "PredictionRequest", "type": "object", "properties": request},
        "PredictionResponse": {"title": "PredictionResponse", "type": "object", "properties": response},
        "ValidationError": {"title": "ValidationError", "type": "object", "properties": problem},
        "HTTPValidationError": {
            "title": "HTTPValidationError",
            "type": "object",
            "properties": {"detail": {"type": "array", "items": _reference("ValidationError")}},
        },
    }
    by_id = [{"name": "prediction_id", "in": "path", "required": True, "schema": text}]
    predict = {
        "requestBody": {"content": _content(_reference("PredictionRequest"))},
        "responses": {
            "200": {"description": "The answer", "content": _content(_reference("PredictionResponse"))},
            "409": {"description": "Busy with another prediction; try again"},
            "422": {"description": "A wrong input", "content": _content(_reference("HTTPValidationError"))},
        },
    }
    done = {"responses": {"200": {"description": "Done"}}}
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": "0.1.0"},
        "paths": {
            "/health-check": {"get": {"summary": "Healthcheck"} | done},
            "/predictions": {"post": {"summary": "Predict"} | predict},
            "/predictions/{prediction_id}": {"put": {"summary": "Predict", "parameters": by_id} | predict},
            "/predictions/{prediction_id}/cancel": {"post": {"summary": "Cancel", "parameters": by_id} | done},
        },
        "components": {"schemas": schemas},
    }


def input_schema(run: typing.Callable) -> tuple[dict, dict]:
    """The JSON Schema of the inputs of a predictor's ``run``, and by name those of the inputs that have choices."""
    properties, required, choices = {}, [], {}
    hints = typing.get_type_hints(run)
    _, *parameters = inspect.signature(run).parameters.values()  # all but self
    for order, parameter in enumerate(parameters):
        name, field = parameter.name, parameter.default
        schema = {"x-order": order, "description": field.description}
        if field.choices:
            choices[name] = {"title": name, "description": "An enumeration.", "enum": field.choices}
            choices[name] |= json_type(hints[name])
            schema["allOf"] = [_reference(name)]
        else:
            schema |= {"title": _title(name)} | json_type(hints[name])
        if field.default is None:
            required.append(name)
        else:
            schema["default"] = field.default
        limits = {key: getattr(field, limit) for limit, key in JSON_LIMITS.items()}
        properties[name] = schema | {key: limit for key, limit in limits.items() if limit is not None}
    return {"type": "object", "properties": properties, "required": required}, choices


def json_type(annotation) -> dict:
    """The JSON Schema of a type that Cog takes: those of JSON_TYPES, BaseModels of them, lists and optional ones."""
    if annotation in JSON_TYPES:
        return JSON_TYPES[annotation]
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is list:
        return {"type": "array", "items": json_type(arguments[0])}
    if types.NoneType in arguments:
        (inner,) = (argument for argument in arguments if argument is not types.NoneType)
        return json_type(inner) | {"nullable": True}
    fields = {name: json_type(hint) for name, hint in typing.get_type_hints(annotation).items()}
    required = [name for name, field in fields.items() if "nullable" not in field]
    properties = {name: {"title": _title(name)} | field for name, field in fields.items()}
    return {"type": "object", "properties": properties, "required": required}


def _title(name: str) -> str:
    return name.replace("_", " ").title()


def _reference(name: str) -> dict:
    return {"$ref": f"#/components/schemas/{name}"}


def _content(schema: dict) -> dict:
    return {"application/json": {"schema": schema}}


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r:.50} is not a port; give a number from 1 to 65535")
    return int(text)


def _slots(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MAX_SLOTS:
        raise argparse.ArgumentTypeError(f"{text!r:.50} is not a number of slots; give one from 1 to {MAX_SLOTS}")
    return int(text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        """One line, where argparse would also print the usage."""
        self.exit(2, f"{self.prog}: {message}\n")


if __name__ == "__main__":
    main()
