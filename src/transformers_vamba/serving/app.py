# SPDX-License-Identifier: Apache-2.0
"""Transformers' web application with what a Vamba model answers, and errors as OpenAI's clients read them."""

import asyncio
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from transformers.cli.serving.server import build_server

from .errors import RequestError, describe_failure, error_body
from .requests import describe_value


# Transformers' others load and unload models for whoever asks, and open what clients name.
SERVED = ("/health", "/v1/chat/completions")
MAX_BODY_BYTES = 2**28
NO_JSON = "The body of the request must be an object of JSON, sent with the header Content-Type: application/json"


def build_vamba_server(model_manager, chat_handler, **kwargs: Any) -> FastAPI:
    """In the place of Transformers' `build_server`, with the same arguments."""
    app = build_server(model_manager, chat_handler, **kwargs)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in SERVED]
    name = model_manager.force_model

    @app.get("/v1/models")
    def list_models() -> dict:
        model = {"id": name, "object": "model", "created": 0, "owned_by": "", "status": {"value": "loaded"}}
        return {"object": "list", "data": [model]}

    @app.post("/load_model")  # `transformers chat` begins with it
    async def load_model(body: dict) -> StreamingResponse:
        if body.get("model") != name:
            message = f"There is no model {describe_value(body.get('model'))}: this server has {name!r}."
            raise RequestError(message, "model", "model_not_found")
        events = model_manager.load_model_streaming(model_manager.process_model_name(name))
        return StreamingResponse(events, media_type="text/event-stream")

    @app.exception_handler(Exception)
    @app.exception_handler(RequestError)
    async def tell(_request: Request, error: Exception) -> JSONResponse:
        status, body = describe_failure(error)
        return JSONResponse(body, status)

    @app.exception_handler(RequestValidationError)
    async def tell_no_json(_request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(error_body(f"{NO_JSON}: {error.errors()[0]['msg']}.", "invalid_request_error"), 400)

    @app.exception_handler(HTTPException)
    async def tell_status(_request: Request, error: HTTPException) -> JSONResponse:
        message = f"{error.detail}. This server has /v1/chat/completions, /v1/models and /health."
        if error.status_code == 400:  # not UTF-8, nested too deeply, or numbers that are too long
            message = f"{NO_JSON}, and could not be read."
        return JSONResponse(error_body(message, "invalid_request_error"), error.status_code)

    app.add_middleware(WatchedRequests, max_bytes=min(chat_handler.options.limits.max_bytes * 3 // 2, MAX_BODY_BYTES))
    return app


class WatchedRequests:
    """
    Refuses bodies that are too large, and cancels the work for a client that has left.

    Args:
        app: The application.
        max_bytes (`int`): Of a body.
    """

    def __init__(self, app, max_bytes: int):
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if len(body) > self.max_bytes:
                await self._refuse(scope, receive, send)
                return
            if not message.get("more_body"):
                break
        messages = [{"type": "http.request", "body": bytes(body)}]
        has_left = asyncio.Event()

        async def replay() -> dict:
            if messages:
                return messages.pop()
            await has_left.wait()
            return {"type": "http.disconnect"}

        async def wait_for_client() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            has_left.set()

        work = asyncio.create_task(self.app(scope, replay, send))
        watch = asyncio.create_task(wait_for_client())
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
        finally:
            watch.cancel()
            if not work.done():
                work.cancel()
        try:
            await work
        except asyncio.CancelledError:
            if not has_left.is_set():
                raise

    async def _refuse(self, scope, receive, send) -> None:
        message = (
            f"The request is larger than {self.max_bytes:,} bytes. Give the server a smaller file, or a large one as "
            "a URL or, if it has a --media-root, as a path."
        )
        await JSONResponse(error_body(message, "invalid_request_error"), 400)(scope, receive, send)
