"""What a link to the page looks like where it is shown: title, description, picture. Gradio's page says its own."""

import re
from html import escape
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse

TITLE = "ConvMixer: what a small network sees in your picture"
DESCRIPTION = "Give it a picture: see what a small neural network makes of it, and where it looked."
PREVIEW = Path(__file__).with_name("preview.jpg")  # 1200 x 630 pixels
THEIRS = re.compile(rb'\s*<meta\s+(?:property="og:|name="twitter:)[^>]*>')


def preview(app):
    """The picture of a link."""
    return FileResponse(PREVIEW)


def page(app):
    """Gradio's page with these tags in the place of its own."""

    async def answer(scope, receive, send) -> None:
        start, body = None, b""

        async def send_changed(message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                start = message
                return
            body += message.get("body", b"")
            if message.get("more_body"):
                return
            if body:  # none follows HEAD
                body = THEIRS.sub(b"", body).replace(b"<head>", b"<head>" + tags(Request(scope)).encode(), 1)
                kept = [pair for pair in start["headers"] if pair[0].lower() != b"content-length"]
                start["headers"] = [*kept, (b"content-length", str(len(body)).encode())]
            await send(start)
            await send({"type": "http.response.body", "body": body})

        await app(scope, receive, send_changed)

    return answer


def tags(request: Request) -> str:
    """With absolute addresses, which is what those who show links need."""
    root = request.scope["app"].get_blocks().root_path
    here = root if root.startswith("http") else str(request.base_url).rstrip("/") + root
    named = {"title": TITLE, "description": DESCRIPTION, "image": f"{here}/preview.jpg", "url": f"{here}/"}
    lines = [f'<meta property="og:{name}" content="{escape(text)}">' for name, text in named.items()]
    lines += [
        '<meta property="og:type" content="website">',
        '<meta name="twitter:card" content="summary_large_image">',
        f'<meta name="description" content="{escape(DESCRIPTION)}">',
    ]
    return "".join(lines)
