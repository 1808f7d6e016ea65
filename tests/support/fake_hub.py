"""A real HTTP server that speaks as much of the hub's language as huggingface_hub asks for."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """`server.repository` alone; `server.refuse` answers for its files, `server.cut` says where to break off."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body):
        path, name = self.path.split("?")[0], self.server.repository
        if not re.match(rf"/(api/models/)?{name}(/|$)", path):
            return self.error(404, "RepoNotFound", "Repository not found")
        if match := re.match(rf"/{name}/resolve/([^/]+)/(.+)", path):
            return self.file(match[2], body)
        if path.endswith("/revision/none"):
            return self.error(404, "RevisionNotFound", "Invalid rev id")
        return self.listing(path)

    def listing(self, path):
        files = [
            {"type": "file", "rfilename": n, "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
            for n, d in self.server.files.items()
        ]
        tree = "/tree/" in path
        self.send(200, files if tree else {"id": self.server.repository, "sha": COMMIT, "siblings": files})

    def file(self, name, body):
        if self.server.refuse:
            return self.error(*self.server.refuse)
        data = self.server.files[name]
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        self.server.ranges.append((name, start))
        self.send_response(206 if start else 200)
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        headers |= {"Content-Length": len(data) - start}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()
        if body:
            place, times = self.server.cut.get(name, (len(data), 0))
            self.server.cut[name] = (place, times - 1) if times > 1 else (len(data), 0)
            self.wfile.write(data[start:place])
            if place < len(data):
                self.close_connection = True
        return None

    def error(self, status, code, message):
        self.send(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def send(self, status, value, headers=None):
        data = json.dumps(value).encode()
        self.send_response(status)
        for key, text in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextmanager
def serving(files, *, repository="owner/model"):
    """A hub with one repository of `files` (name -> bytes), on a port of its own."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repository, server.files = repository, files
    server.refuse, server.cut, server.ranges = None, {}, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
