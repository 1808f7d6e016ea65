"""Whether a request comes from where it may: a browser carries any page's requests to a server on this machine.

A page may post to a loopback address, and a name of its own may turn into one (DNS rebinding). So a server without
a key answers to loopback names and to its own page alone.
"""

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from megatron_mixtral.serve.http.errors import Problem

OWN_SITE = ("same-origin", "none")  # `none`: typed by the user, or from a bookmark
BODILESS = ("GET", "HEAD", "OPTIONS")  # the methods that carry no body


def check_host(headers: Headers) -> None:
    """403 unless the one Host is a name of this machine for itself."""
    given = headers.getlist("host")
    if len(given) != 1 or not _is_loopback(_name(given[0])):
        asked = ", ".join(map(repr, given)) or "none"
        raise _refused(f"host {asked}: without a key this server answers to localhost, 127.0.0.1 and [::1] alone")


def check_site(method: str, headers: Headers) -> None:
    """403 for what a page of another site asks for; a link that leads to the chat page is no such thing."""
    mode, what = headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")
    if (method, mode, what) == ("GET", "navigate", "document"):
        return
    own = headers.get("host", "").lower()
    for origin in headers.getlist("origin"):
        if origin.partition("://")[2].lower() != own or not own:
            raise _refused(f"origin {origin!r}: without a key this server answers its own page alone")
    if headers.get("sec-fetch-site", "none") not in OWN_SITE:
        raise _refused("another site's page asks: without a key this server answers its own page alone")


def check_kind(method: str, headers: Headers) -> None:
    """400 for a body that isn't declared as JSON: a browser lets any page send other kinds to any server."""
    has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    if method not in BODILESS and has_body and not _is_json(headers.get("content-type", "")):
        raise Problem(400, "the body must be a JSON object, sent with Content-Type: application/json")


def _refused(why: str) -> Problem:
    return Problem(403, why, code="not_from_here")


def _is_json(kind: str) -> bool:
    name = kind.partition(";")[0].strip().lower()
    return name == "application/json" or (name.startswith("application/") and name.endswith("+json"))


def _name(host: str) -> str:
    """The name in a Host header, without its port; nothing for what is none."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port
    except ValueError:
        return ""
    return parts.hostname or "" if parts.netloc == host and "@" not in host else ""


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
