"""Between a visitor's request and the server's files: nothing but uploads is ever opened, and no other host is called.

Gradio opens what a payload names before the app's function runs, and a raw client can name any file of the server, or
an address for it to ask. So the check stands where every request passes, in the Blocks object.
"""

import base64
import contextlib
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import gradio as gr
from gradio.data_classes import ListFiles
from gradio.utils import get_upload_folder
from gradio_client.utils import value_is_file
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse

NAME_LENGTH = 100
MAX_FILE = 20 * 1024**2  # bytes
MAX_SESSIONS = 1000  # visitors that the page remembers, at 170 KB each; then it forgets who came first
MAX_FOLDER = 5 * 2**30  # bytes of all uploads together; beyond it the oldest go before their time
REFUSAL = "This file is not among the uploads, or no longer; please choose it again."
TOOL_REFUSAL = (
    "A picture must be a data:image/...;base64,... URL of at most 20 MB, or a file that was uploaded to this server at "
    "/gradio_api/upload; no other file is opened, and no address is fetched."
)
FILE_INPUTS = (gr.Image, gr.File, gr.UploadButton, gr.DownloadButton)
# What the page and an API client need. Gradio's other routes fetch any web address for any visitor (file=http...), run
# ffmpeg on a visitor's film, write a file for each link to the page's state, or show what others ask (monitoring).
OPEN_ROUTES = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/(assets|static|svelte)/.*|/gradio_api/("
    r"(login_check|reset)/?|info|openapi\.json|app_id|startup-events|theme\.css|upload|upload_progress|cancel|"
    r"queue/(join|data|status)|heartbeat/[^/]+|(run|api)/[^/]+/?|call/.+|file=(?P<file>.+)|(?P<mcp>mcp/?))"
)


@dataclass(frozen=True)
class Upload:
    """A visitor's file. The name is one printable line of at most NAME_LENGTH characters; HTML must still escape it."""

    name: str
    path: Path  # in the upload folder, where gradio may have changed the file's name


def guard(blocks: gr.Blocks, own_routes: dict | None = None) -> None:
    """Let no request to ``blocks`` name anything but an upload; to be called once, when all events are there.

    own_routes: by path a function that takes Gradio's ASGI app and gives another, which answers there.

    The components in FILE_INPUTS then give the event's function an Upload, a list of them where they take several, or
    None where they are empty. In other inputs and in an event's data, too, a dict with a "path" counts as a file. What
    is no upload ends the event with gr.Error: paths outside, unseen, and addresses (http:, data:), for a client uploads
    its file first. Raises TypeError if any other component that holds files, such as gr.Gallery, is an input, or if an
    event has one of these inputs as its output: it would give the visitor a new one.
    """
    events = blocks.fns.values()
    updated = {block for event in events for block in event.outputs}
    for block in (block for event in events for block in event.inputs):
        kind = f"gr.{type(block).__name__}"
        if not isinstance(block, FILE_INPUTS):
            if value_is_file(block.api_info()):
                raise TypeError(f"{kind} can hold files; as an input, make it one of {FILE_INPUTS}")
        elif block in updated:
            raise TypeError(f"an event gives a visitor another {kind}, which would not be guarded")
        else:
            block.preprocess = _to_uploads
    preprocess_data, process_api = blocks.preprocess_data, blocks.process_api

    async def guarded_preprocess_data(event, inputs, state, explicit_call=False):
        try:
            return await preprocess_data(event, _checked(list(inputs)), state, explicit_call)
        except gr.Error:
            raise
        except Exception as error:  # of Gradio's components, about what no page would send
            names = ", ".join(block.label or "?" for block in event.inputs if getattr(block, "label", None))
            line = f"This does not fit; the inputs are {names}, in this order."
            raise gr.Error(line, print_exception=False) from error

    async def guarded_process_api(*arguments, event_data=None, **options):
        if event_data is not None:
            event_data._data = _checked(event_data._data)
        return await process_api(*arguments, event_data=event_data, **options)

    blocks.preprocess_data, blocks.process_api = guarded_preprocess_data, guarded_process_api
    blocks.own_routes = own_routes or {}


def launch_options(mcp: bool = False) -> dict:
    """For Blocks.launch: with them the server shows no file of its own and no traceback, and calls no other host.

    mcp: whether the API is also there as tools for language models, which needs gradio[mcp].
    """
    closed = dict.fromkeys(("share", "ssr_mode", "run_history", "show_error", "enable_monitoring"), False)
    app = {"middleware": [Middleware(_with_open_routes)]} | ({"lifespan": _with_checked_tools} if mcp else {})
    limits = {"max_file_size": MAX_FILE, "state_session_capacity": MAX_SESSIONS}
    return closed | limits | {"mcp_server": mcp, "app_kwargs": app}


def delete_old_files(folder: str, age: float, limit: float = MAX_FOLDER, keep: Collection[str] = ()) -> None:
    """Delete what is older than ``age`` seconds in ``folder``, and the oldest files beyond ``limit`` bytes together.

    Files in ``keep`` stay; folders go when they are empty.
    """
    files, oldest, total = [], time.time() - age, 0
    for parent, folders, names in os.walk(folder, topdown=False):
        for path in (os.path.join(parent, name) for name in folders + names):
            with contextlib.suppress(OSError):  # gone already, or a folder that is not empty
                found = os.lstat(path)
                if not stat.S_ISDIR(found.st_mode):
                    files.append((found.st_ctime, found.st_size, path))  # mtime may be that of a copy's original
                elif found.st_ctime < oldest:
                    os.rmdir(path)
    for changed, size, path in sorted(files, reverse=True):
        total += size
        if path not in keep and (changed < oldest or total > limit):
            with contextlib.suppress(OSError):
                os.remove(path)


def start_deleting(blocks: gr.Blocks, age: float = 3600, every: float = 60) -> None:
    """Keep gradio's folder clean, but for the app's examples; another app that shares it loses its files, too."""
    # Blocks(delete_cache=...) forgets broken uploads, copies by updated components and what an earlier process left.
    folder = os.path.realpath(get_upload_folder())
    keep = {os.path.realpath(path) for block in blocks.blocks.values() for path in block.keep_in_cache}

    def run() -> None:
        while True:
            time.sleep(every)
            delete_old_files(folder, age, keep=keep)

    threading.Thread(target=run, name="delete old uploads", daemon=True).start()


def _upload_path(path: object) -> str | None:
    """``path``, if it has the form of an upload's: folder/hash/name. The disk is not asked about it."""
    with contextlib.suppress(TypeError, ValueError):
        parent, name = os.path.split(os.path.abspath(path))
        folder, digest = os.path.split(parent)
        roots = [form(get_upload_folder()) for form in (os.path.abspath, os.path.realpath)]
        return os.path.join(parent, name) if name and folder in roots and re.fullmatch("[0-9a-f]{64}", digest) else None


def _checked(value: object) -> object:
    """A payload in which every file is an upload and says nothing more: no address, no stream, no claims about it."""
    if not isinstance(value, dict):
        return [*map(_checked, value)] if isinstance(value, list) else value
    if "path" not in value:
        return {key: _checked(each) for key, each in value.items()}
    path = _upload_path(value["path"])
    with contextlib.suppress(OSError, ValueError):  # no such file, or a name that no file can have
        if path and stat.S_ISREG(os.lstat(path).st_mode) and not os.path.islink(os.path.dirname(path)):
            name = _display_name(value.get("orig_name"), os.path.basename(path))
            return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}
    raise gr.Error(REFUSAL, duration=8, print_exception=False)


def _display_name(given: object, fallback: str) -> str:
    name = re.split(r"[/\\]", given)[-1].strip() if isinstance(given, str) else ""
    name = "".join(character if character.isprintable() else "?" for character in name or fallback)
    return name if len(name) <= NAME_LENGTH else "…" + name[1 - NAME_LENGTH :]  # the end tells the kind of file


def find_upload(name: object, path: object) -> Upload | None:
    """The upload that a visitor's page names; None if it is no longer there, or none."""
    with contextlib.suppress(gr.Error):
        return _to_upload(_checked({"path": path, "orig_name": name}))


def _to_upload(file: dict) -> Upload:
    return Upload(file["orig_name"], Path(file["path"]))


def _to_uploads(payload) -> Upload | list[Upload] | None:
    """Stands in for a component's preprocess, which would open the file."""
    if isinstance(payload, ListFiles):
        return [*map(_to_uploads, payload)]
    file = payload and _checked(payload.model_dump())  # again, for an image may come with an address and no path
    return file and _to_upload(file)


def _with_open_routes(app):
    """ASGI middleware that knows no routes but OPEN_ROUTES, and no files but those that gradio made."""

    async def answer(scope, receive, send) -> None:
        if scope["type"] == "http" and (own := getattr(scope["app"].get_blocks(), "own_routes", {}).get(scope["path"])):
            return await own(app)(scope, receive, send)
        route = OPEN_ROUTES.fullmatch(scope.get("path", ""))
        is_open = (route and (route["file"] is None or _upload_path(route["file"]))) or scope["type"] == "lifespan"
        if route and route["mcp"]:  # Gradio calls itself to answer: where it knows, or where the request's headers say
            tools = scope["app"].get_blocks().mcp_server_obj
            is_open = tools and tools.local_url
        if route and route[0] == "/gradio_api/info":  # else all see the address under which the first visitor asked,
            scope["app"].api_info = None  # and by x-forwarded-host a visitor could have us name any other
        if route and route[0] == "/gradio_api/upload_progress":
            send = _never_missing(send)
        with contextlib.suppress(ClientDisconnect):  # in the middle of an upload; nothing for the server's log
            await (app if is_open else PlainTextResponse("Not Found", 404))(scope, receive, send)

    return answer


def _never_missing(send):
    """For the progress of an upload: Gradio's 404, where an upload is late or already there, is an error in the
    browser's console; the page only needs to hear that there is nothing to wait for."""
    missing = False

    async def send_done(message) -> None:
        nonlocal missing
        if message["type"] == "http.response.start" and message["status"] == 404:
            missing = True
            message = message | {"status": 200, "headers": [(b"content-type", b"text/event-stream")]}
        elif missing and message["type"] == "http.response.body":
            message = message | {"body": b'data: {"msg": "done"}\n\n'}
        await send(message)

    return send_done


@contextlib.asynccontextmanager
async def _with_checked_tools(app) -> AsyncIterator[None]:
    """While the server runs, arguments of tools pass _tool_arguments.

    Gradio's own function leaves addresses in them. And it hands all of them to a gradio_client, which opens each file
    of the server that a dict in them names; that there is none in them is checked only where a list of tools is cached.
    """
    if tools := app.get_blocks().mcp_server_obj:
        tools.convert_strings_to_filedata = _tool_arguments
    yield


def _tool_arguments(arguments: dict, positions: list[list]) -> dict:
    """A tool's arguments, in which every file is an upload. positions: where files are given, as texts."""
    files = {position[0] for position in positions}
    try:
        return _checked({name: _tool_file(value) if name in files else value for name, value in arguments.items()})
    except (gr.Error, ValueError) as error:
        raise ValueError(TOOL_REFUSAL) from error


def _tool_file(value: object) -> object:
    """A data: URL is written among the uploads; what ends as an upload's address does is that upload."""
    if not isinstance(value, str):
        return value
    if not value.startswith("data:"):
        return {"path": unquote(value.rpartition("/gradio_api/file=")[2]) if "://" in value else value}
    kind, _, text = value.partition(",")
    if not kind.endswith(";base64") or len(text) > 4 * MAX_FILE / 3 + 4:
        raise ValueError("this is no data: URL of a file, or too much")
    path = Path(get_upload_folder(), secrets.token_hex(32), "image")
    path.parent.mkdir(parents=True)
    path.write_bytes(base64.b64decode(text))
    return {"path": str(path)}
