"""`python -m vlm_tune server ckpt=RUN`: answer OpenAI's chat requests on this machine, several at once.

Starlette and uvicorn speak HTTP; `speaker` answers.
"""

import asyncio
import json
import queue
import secrets
import socket
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn
from rich.console import Console
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from vlm_tune.console import tell
from vlm_tune.errors import ConfigError, VlmTuneError
from vlm_tune.model.checkpoint import find_checkpoint
from vlm_tune.model.trained import open_trained
from vlm_tune.serve.chat import Chat
from vlm_tune.serve.requests import Refused, read_request
from vlm_tune.serve.speaker import MOST_WAITING, Job, Speaker

MOST_BYTES = 32 << 20  # of one request: base64 makes pictures a third larger


class Service:
    """The addresses that answer."""

    def __init__(self, speaker: Speaker, name: str, token: str) -> None:
        self.speaker, self.name, self.token = speaker, name, token
        self.chat = Chat(speaker.model, speaker.config)

    def app(self) -> Starlette:
        """Put the addresses together."""
        routes = [
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.models, methods=["GET"]),
            Route("/v1/chat/completions", self.complete, methods=["POST"]),
        ]
        handlers = dict.fromkeys((Refused, HTTPException, Exception), refuse)
        hosts = Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])  # no page of another site
        return Starlette(routes=routes, exception_handlers=handlers, middleware=[hosts])

    def check_token(self, request: Request) -> None:
        """Raise Refused without the token that was asked for."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.token and not secrets.compare_digest(given.encode(), self.token.encode()):
            raise Refused("this server wants its token: api_key=TOKEN", 401, "authentication_error", "invalid_api_key")

    async def models(self, request: Request) -> Response:
        """List the one model, or describe it."""
        self.check_token(request)
        one = {"id": self.name, "object": "model", "created": 0, "owned_by": "vlm_tune"}
        name = request.path_params.get("name")
        if name not in (None, self.name):
            raise no_model(name, self.name)
        return JSONResponse(one if name else {"object": "list", "data": [one]})

    async def complete(self, request: Request) -> Response:
        """Answer a conversation, at once or in pieces."""
        self.check_token(request)
        wish = read_request(await body_of(request), self.chat.config)
        if wish.model != self.name:
            raise no_model(wish.model, self.name)
        try:
            prompt = await run_in_threadpool(self.chat.prompt, wish.sample)
        except VlmTuneError as error:
            raise Refused(str(error)) from error
        try:
            job = self.speaker.take(prompt, wish.limit, wish.sampling)
        except queue.Full:
            raise Refused(f"{MOST_WAITING} requests wait already: try again", 429, "rate_limit_error") from None
        frame = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": self.name}
        if wish.stream:
            events = stream(job, frame, wish.with_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        return await whole(job, frame, request)


async def whole(job: Job, frame: dict[str, Any], request: Request) -> Response:
    """Wait for the whole answer, or until the client has gone."""
    while True:
        try:
            if await asyncio.wait_for(job.pieces.get(), 1.0) is None:
                break
        except TimeoutError:
            job.is_left = job.is_left or await request.is_disconnected()
    if job.fault or job.writer is None:
        raise Refused(job.fault, 500, "server_error")
    message = {"role": "assistant", "content": job.writer.text}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": job.writer.finish}
    return JSONResponse({**frame, "object": "chat.completion", "choices": [choice], "usage": usage(job)})


async def stream(job: Job, frame: dict[str, Any], with_usage: bool) -> AsyncIterator[str]:
    """Yield an answer as server-sent events; a client that goes away ends it."""

    def event(delta: dict[str, str], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return f"data: {json.dumps({**frame, 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"

    try:
        yield event({"role": "assistant", "content": ""})
        while (piece := await job.pieces.get()) is not None:
            yield event({"content": piece})
        if job.fault or job.writer is None:
            yield f"data: {json.dumps(error_body(job.fault, 'server_error'))}\n\n"
            return
        yield event({}, job.writer.finish)
        if with_usage:
            last = {**frame, "object": "chat.completion.chunk", "choices": [], "usage": usage(job)}
            yield f"data: {json.dumps(last)}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        job.is_left = True


def usage(job: Job) -> dict[str, int]:
    """Count the tokens of a prompt, those of its pictures included, and of its answer."""
    asked, said = len(job.prompt.example.input_ids), job.writer.num_tokens if job.writer else 0
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


async def body_of(request: Request) -> bytes:
    """Read a request's body; raise Refused for one that is too large before more of it is read."""
    content = b""
    try:
        async for piece in request.stream():
            content += piece
            if len(content) > MOST_BYTES:
                raise Refused(f"the request is larger than {MOST_BYTES >> 20} MiB: make its pictures smaller", 413)
    except ClientDisconnect as error:
        raise Refused("the client has gone") from error
    return content


def no_model(asked: object, name: str) -> Refused:
    """Return the error to raise for a request of another model."""
    return Refused(f"model={asked!r}: no such model here. There is: {name!r}", 404, code="model_not_found")


def error_body(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """Write an error as OpenAI does."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


async def refuse(request: Request, error: Exception) -> Response:
    """Answer with an error."""
    match error:
        case Refused():
            return JSONResponse(error_body(str(error), error.kind, error.code), error.status)
        case HTTPException():
            words = (
                f"{request.method} {request.url.path}: {error.detail}. There are /v1/chat/completions and /v1/models"
            )
            return JSONResponse(error_body(words, "invalid_request_error"), error.status_code)
    return JSONResponse(error_body(f"{type(error).__name__}: {error}", "server_error"), 500)


def open_port(port: int) -> socket.socket:
    """Open a port on this machine alone; raise ConfigError where it is taken."""
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise ConfigError(f"port={port}: {error.strerror}. Give another one, or port=0 for any that is free") from error


def make_server(speaker: Speaker, name: str, token: str) -> uvicorn.Server:
    """Prepare the server of a model that goes by a name."""
    app = Service(speaker, name, token).app()
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5))


def serve(ckpt: str, port: int, token: str, overrides: list[str], console: Console) -> None:
    """Answer requests until Ctrl-C."""
    with open_port(port) as listening:
        model, config = open_trained(ckpt, overrides)
        tell(console, model.notes)
        name = Path(find_checkpoint(ckpt)).resolve().parent.parent.name
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        console.print(f"serving {name}: {address}", soft_wrap=True)
        key = "TOKEN" if token else "-"
        console.print(f'OpenAI(base_url="{address}", api_key="{key}"), model="{name}". Ctrl-C ends it', soft_wrap=True)
        with Speaker(model, config) as speaker, suppress(KeyboardInterrupt):
            make_server(speaker, name, token).run([listening])
