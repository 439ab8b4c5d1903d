"""Answers about what moves: a frame comes in, and the parts of the page that change go out. No queue, and no files.

Gradio's own way of an event takes several times as long as a small network.
"""

import anyio
from starlette.requests import Request
from starlette.responses import JSONResponse

from convmixer import ImageError
from demo import render, words
from demo.answers import TOP_K, Answers, Problem, about_picture

MAX_BYTES = 500_000  # of a frame; the page sends some 15,000
WAITING = 20  # frames that may wait; the page of a further one tries again by itself
NAME = "the picture"


def route(answers: Answers):
    """An ASGI app: POST a picture, with ?model=..., get {"stage": HTML, "bars": HTML} or {"problem": one sentence}."""
    one_at_a_time = anyio.CapacityLimiter(1)  # the network uses all cores

    async def respond(request: Request) -> JSONResponse:
        frame = b""
        async for part in request.stream():
            frame += part
            if len(frame) > MAX_BYTES:
                return JSONResponse({"problem": "this frame is too large"}, 413)
        if one_at_a_time.statistics().tasks_waiting >= WAITING:
            return JSONResponse({"problem": "too many people are using the camera here; try again in a minute"})
        model = request.query_params.get("model", "auto")
        return JSONResponse(await anyio.to_thread.run_sync(answer, model, frame, limiter=one_at_a_time))

    def answer(model: str, frame: bytes) -> dict:
        try:
            classifier = answers.classifier(model)
            predictions, maps = classifier.classify_with_heatmaps(frame, TOP_K)
        except Problem as problem:
            return {"problem": render.sentence(str(problem))}
        except ImageError as error:
            return {"problem": render.sentence(about_picture(NAME, error))}
        name = answers.models.name(model)
        remark = words.verdict(predictions, len(classifier.labels)) or "\u00a0"  # always a line, so that nothing jumps
        # Not "main", as that would bring the picture itself.
        return {
            "stage": render.stage("live", NAME, predictions, maps),
            "bars": render.bars("main", name, predictions, remark, ""),
        }

    async def app(scope, receive, send) -> None:
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        response = await respond(Request(scope, receive)) if is_post else JSONResponse({}, 405)
        await response(scope, receive, send)

    return app
