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
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_mixtral.serve.admission import Refused, Service, Unavailable
from megatron_mixtral.serve.http import errors, megatron, openai
from megatron_mixtral.serve.http.errors import Problem
from megatron_mixtral.serve.http.requests import ServedModel

APIS = (openai, megatron)  # each with a `router`
LARGEST_BODY = 32 * 1024 * 1024
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
    return Guard(app, key=key, count=service.metrics.answered)


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
    """Wraps all routes: checks the key and the size of bodies, counts answers, hides tracebacks from clients."""

    def __init__(self, app: ASGIApp, *, key: str | None, count: Callable[[str, int], None]) -> None:
        self._app, self._key, self._count = app, key, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # treated as GET; uvicorn leaves out the body
            scope = {**scope, "method": "GET"}
        request, body = HttpRequest(scope), _Body(receive)
        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            if body.too_large and not status:
                return  # the route's answer to half a body; the correct answer follows
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(request)
            await self._app(scope, body.receive, counted)
            if body.too_large and not status:
                body.too_large = False
                await errors.body_for(request, _too_large())(scope, receive, counted)
        except Problem as problem:
            if not status:
                await errors.body_for(request, problem)(scope, receive, counted)
        except Exception as error:
            log.exception("%s %s failed", scope["method"], scope["path"])
            if not status:
                await errors.body_for(request, errors.from_exception(error))(scope, receive, counted)
        finally:
            route = scope.get("route")
            self._count(getattr(route, "path", "other"), status)

    def _check(self, request: HttpRequest) -> None:
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > LARGEST_BODY:
            raise _too_large()
        if self._key is None or request.url.path == "/health":
            return
        given = presented_key(request.headers.get("authorization", ""))
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


class _Body:
    """A request's body, counted while it arrives, and cut off if it is too large."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self._read, self.too_large = receive, 0, False

    async def receive(self) -> Message:
        message = await self._receive()
        self._read += len(message.get("body", b""))
        if self._read > LARGEST_BODY:
            self.too_large = True
            return {"type": "http.request", "body": b"", "more_body": False}
        return message


def _too_large() -> Problem:
    return Problem(413, f"the body is larger than {LARGEST_BODY} bytes", code="body_too_large")
