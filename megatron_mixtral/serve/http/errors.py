"""Every error for a client, as one exception with the OpenAI API's error body."""

from collections.abc import Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.requests import Request as HttpRequest

from megatron_mixtral.serve.admission import Refused, Unavailable

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class OpenAIError(BaseModel):
    """The inside of an error body."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIRefusal(BaseModel):
    """The body of every error under `/v1`."""

    error: OpenAIError


class MegatronRefusal(BaseModel):
    """The body of every error of `/api`."""

    message: str


def documented(body: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The errors in the OpenAPI description; `default` replaces FastAPI's 422."""
    words = {400: "A mistake in the request", 429: "The queue is full", 503: "Shutting down, or a rank is gone"}
    words |= {401: "A key is needed", 403: "Not from here", 404: "No such model", 413: "The body is too large"}
    found: dict[int | str, dict[str, Any]] = {code: {"model": body, "description": words[code]} for code in words}
    return {**found, "default": {"model": body, "description": "Any other refusal"}}


class Problem(Exception):
    """An answer other than 2xx."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        kind = KINDS.get(status, "server_error")
        self.error = {"message": message, "type": kind, "param": param, "code": code}


def from_exception(error: Exception) -> Problem:
    """The client's error for a handler's exception."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, Refused):
        wait = {"Retry-After": str(error.retry_after)}
        return Problem(429, "the queue is full; try again later", code="queue_full", headers=wait)
    if isinstance(error, Unavailable):
        return Problem(503, str(error) or "the server isn't ready", code="unavailable")
    return Problem(500, "the server failed on this request; its log says why")


def from_validation(error: RequestValidationError) -> Problem:
    """The first error that pydantic found, in the API's words."""
    finding = _closest(error.errors())
    where = _path(finding)
    if finding["type"] == "json_invalid":
        return Problem(400, f"the body isn't JSON: {finding.get('ctx', {}).get('error', 'syntax error')}")
    if not where and finding["type"] in ("model_attributes_type", "model_type", "dict_type", "missing"):
        return Problem(400, "the body must be a JSON object, sent with Content-Type: application/json")
    if finding["type"] in ("extra_forbidden", "none_required"):
        return Problem(400, f"unrecognized or unsupported request argument: {'.'.join(where)}", param=where[0])
    message = finding["msg"].removeprefix("Value error, ")
    place = f"{'.'.join(where)}: " if where else ""
    return Problem(400, f"{place}{message}", param=where[0] if where else None)


def _closest(findings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The error for the type that is closest to the given value, if a field may have several types."""
    field = findings[0]["loc"][:2]
    same = (finding for finding in findings if finding["loc"][:2] == field)

    def likeness(finding: dict[str, Any]) -> tuple[bool, int, bool]:
        kind = finding["type"]
        return kind == "too_long", len(finding["loc"]), not kind.endswith("_type")

    return max(same, key=likeness)


def _path(finding: dict[str, Any]) -> list[str]:
    """Names and indices of the wrong field, without pydantic's names of types in between."""
    _body, *inner = (str(part) for part in finding["loc"])
    last = inner.pop() if finding["type"] == "extra_forbidden" else None  # the client's own word, whatever it is
    named = [part for part in inner if part not in ("str", "constrained-str") and "[" not in part]
    return named if last is None else [*named, last]


def openai_body(problem: Problem) -> JSONResponse:
    return JSONResponse({"error": problem.error}, problem.status, problem.headers)


def megatron_body(problem: Problem) -> JSONResponse:
    """`text_generation_cli.py` prints the `message` of an error."""
    return JSONResponse({"message": problem.error["message"]}, problem.status, problem.headers)


def body_for(request: HttpRequest, problem: Problem) -> JSONResponse:
    """The error body in the format of the route's clients."""
    return megatron_body(problem) if request.scope["path"] == "/api" else openai_body(problem)
