"""The HTTP application: the key, the routes, and one format for every error.

Every route except `/health` requires the key if there is one, as a bearer token, or for browsers as the password of
HTTP's basic authentication.
"""

import base64
import binascii
import hmac
import importlib.metadata
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_mixtral.serve.admission import Refused, Service, Unavailable
from megatron_mixtral.serve.http import bounds, errors, megatron, openai, visitors
from megatron_mixtral.serve.http.errors import Problem
from megatron_mixtral.serve.http.requests import ServedModel

APIS = (openai, megatron)  # each with a `router`
PAGE = Path(__file__).with_name("page.html")
log = logging.getLogger("mixlaunch.serve")


def application(model: ServedModel, service: Service, *, key: str | None) -> ASGIApp:
    """The whole site, with the guard around it."""
    app = FastAPI(title="mixlaunch", version=version(), docs_url=None, redoc_url=None)
    # The guard checks the key; this only mentions it in the OpenAPI description.
    described = [Depends(HTTPBearer(auto_error=False))] if key else []
    for api in APIS:
        app.include_router(api.router(model, service), dependencies=described)
    app.include_router(_health(service))
    app.include_router(_state_routes(service), dependencies=described)
    _add_page(app)
    _add_refusals(app)
    return Guard(app, key=key, limits=model.bounds, count=service.metrics.answered)


def version() -> str:
    return importlib.metadata.version("mixlaunch")


class Status(BaseModel):
    """The server's state: ready, draining or failed, and the reason if it isn't ready."""

    status: str
    reason: str = ""


def _health(service: Service) -> APIRouter:
    """The one route that needs no key."""
    routes = APIRouter()

    @routes.get(
        "/health",
        response_model=Status,
        responses={503: {"model": Status, "description": "A rank of the engine is gone"}},
    )
    async def health() -> Any:
        """Alive: 503 after a rank of the engine has died."""
        status = Status(status=service.state, reason=service.reason)
        return JSONResponse(status.model_dump(), 503 if service.state == "failed" else 200)

    return routes


def _state_routes(service: Service) -> APIRouter:
    routes = APIRouter(responses={401: errors.documented(errors.OpenAIRefusal)[401]})

    @routes.get(
        "/ready",
        response_model=Status,
        responses={503: {"model": Status, "description": "Shutting down, or a rank is gone"}},
    )
    async def ready() -> Any:
        """Whether new requests are accepted."""
        status = Status(status=service.state, reason=service.reason)
        return JSONResponse(status.model_dump(), 200 if service.state == "ready" else 503)

    @routes.get("/version")
    async def versions() -> dict[str, str]:
        names = ("torch", "megatron-core")
        return {"mixlaunch": version(), **{name: importlib.metadata.version(name) for name in names}}

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return routes


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        policy = "default-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"
        return HTMLResponse(PAGE.read_text(), headers={"Content-Security-Policy": policy})


def _add_refusals(app: FastAPI) -> None:
    Answer = Callable[[HttpRequest, Any], Awaitable[Response]]

    def handler(meaning: Callable[[Any], Problem]) -> Answer:
        async def answer(request: HttpRequest, error: Any) -> Response:
            return errors.body_for(request, meaning(error))

        return answer

    app.add_exception_handler(RequestValidationError, handler(errors.from_validation))
    app.add_exception_handler(
        HTTPException, handler(lambda e: Problem(e.status_code, str(e.detail), headers=e.headers))
    )
    for kind in (Problem, Refused, Unavailable, Exception):
        app.add_exception_handler(kind, handler(errors.from_exception))

    @app.exception_handler(ClientDisconnect)
    async def gone(_: HttpRequest, __: ClientDisconnect) -> Response:
        return PlainTextResponse("", 499)  # nobody reads it


class Guard:
    """Wraps all routes: checks visitor, key and size of bodies, counts answers, hides tracebacks from clients.

    What it decides it decides by the path that the routes go by, which isn't the one in `request.url`: Starlette
    made that of the Host header for long, and so of what the client liked.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        key: str | None,
        limits: bounds.Bounds,
        count: Callable[[str, int], None],
    ) -> None:
        self._app, self._key, self._bounds, self._count = app, key, limits, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # treated as GET; uvicorn leaves out the body
            scope = {**scope, "method": "GET"}
        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def refuse(problem: Problem) -> None:
            if not status:
                await errors.body_for(HttpRequest(scope), problem)(scope, receive, counted)

        try:
            self._check(scope)
            read = await _read(receive, self._bounds.body(scope["path"]))
            bounds.check_fields(read["body"], self._bounds)
            await self._app(scope, _again(read, receive), counted)
        except ClientDisconnect:
            status = 499  # nobody reads the answer
        except Problem as problem:
            await refuse(problem)
        except Exception as error:
            log.exception("%s %s failed", scope["method"], scope["path"])
            await refuse(errors.from_exception(error))
        finally:
            route = scope.get("route")
            self._count(getattr(route, "path", "other"), status)

    def _check(self, scope: Scope) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        if self._key is None:
            visitors.check_host(headers)
            visitors.check_site(scope["method"], headers)
        elif path != "/health":
            self._check_key(presented_key(headers.get("authorization", "")))
        visitors.check_kind(scope["method"], headers)
        length, most = headers.get("content-length", "0"), self._bounds.body(path)
        if length.isdigit() and int(length) > most:
            raise _too_large(most)

    def _check_key(self, given: str | None) -> None:
        assert self._key is not None
        if given is None or not hmac.compare_digest(given.encode(), self._key.encode()):
            challenge = {"WWW-Authenticate": 'Basic realm="mixlaunch", charset="UTF-8"'}
            raise Problem(401, "a valid API key is needed", code="invalid_api_key", headers=challenge)


def presented_key(authorization: str) -> str | None:
    """The key in an Authorization header: a bearer token, or the password of basic authentication."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return None
    return None


async def _read(receive: Receive, most: int) -> Message:
    """The whole body as one message; 413 as soon as it is larger than `most` bytes."""
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        size, more = size + len(parts[-1]), message.get("more_body", False)
        if size > most:
            raise _too_large(most)
    return {"type": "http.request", "body": b"".join(parts), "more_body": False}


def _again(read: Message, receive: Receive) -> Receive:
    """`receive` as it was before `read` was taken from it."""
    waiting = [read]

    async def next_one() -> Message:
        return waiting.pop() if waiting else await receive()

    return next_one


def _too_large(most: int) -> Problem:
    why = f"the body is larger than {most} bytes, which is more than this model's context needs"
    return Problem(413, why, code="body_too_large")
