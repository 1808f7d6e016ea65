"""Servers that a laptop reaches through a tunnel over the login node."""

import re
import shutil
import signal
import socket
import sys

import httpx
import pytest
import sshd
from laptop import REASON, configure

from launcher.host import ssh

pytestmark = pytest.mark.skipif(not sshd.find() or not shutil.which("rsync"), reason=REASON)


# What `serve` runs on its one rank: says that it is ready, and answers who has its key with one word.
ANSWER = """
import http.server, json, os, socket, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
        known = self.headers["Authorization"] == f"Bearer {os.environ['MIXLAUNCH_API_KEY']}"
        piece = {"choices": [{"delta": {"content": f"heard {asked}" if known else "no key"}}]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"data: {json.dumps(piece)}\\n\\ndata: [DONE]\\n\\n".encode())
server = http.server.HTTPServer(("", 0), Handler)
state = {"host": HOST, "port": server.server_port, "model": "small"}
state["url"] = f"http://{state['host']}:{server.server_port}"
run = os.environ["MIXLAUNCH_RUN"]
open(f"{run}/server.json", "w").write(json.dumps(state))
open(f"{run}/events.jsonl", "a").write(json.dumps({"time": 1, "event": "ready", "url": state["url"]}) + "\\n")
server.serve_forever()
"""


@pytest.mark.parametrize(
    "host",
    [
        pytest.param("socket.gethostname()", id="every interface"),
        pytest.param("'127.0.0.1'", id="loopback", marks=pytest.mark.soak),
    ],
)
def test_a_server_is_asked_through_a_tunnel(laptop, stub, host):
    laptop.change(python=stub(ANSWER.replace("HOST", host), sys.executable))
    process = laptop.start("serve", "--model", f"{laptop.far}/models/m", "--pp", "1", "--tunnel")
    said = ""
    while "on this machine it is" not in said:
        line = process.stdout.readline()
        assert line, process.communicate()
        said += line
    url = re.search(r"on this machine it is (http://127.0.0.1:\d+)", said)[1]
    [run] = laptop.there()
    key = (run.path / "secrets.env").read_text().partition("=")[2].strip()
    body = {"messages": [{"role": "user", "content": "me"}]}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"})
    assert "heard me" in answer.text
    assert laptop.types("chat", "-p", "you there") == "heard you there\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert "continues; the tunnel is closed" in out
    assert key not in said + out + err
    with pytest.raises(httpx.ConnectError):
        httpx.post(f"{url}/v1/chat/completions", json=body)
    assert not [path for path in laptop.home.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]


def test_a_node_that_only_the_login_node_sees_is_reached_through_it(laptop, monkeypatch):
    """As the user's own configuration names it; the way to the login node is the connection that is open."""
    options = "\n".join(f"  {name} {value}" for name, value in laptop.server.options.items())
    configure(laptop, f"Host node1\n  HostName 127.0.0.1\n{options}\n")
    monkeypatch.setenv("PATH", str(laptop.bin), prepend=":")
    node = ssh.behind(laptop.server.login, "node1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ssh.connect(laptop.server.login)
    ssh.forward(node, port, "localhost", laptop.server.port)
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as connection:
            assert connection.recv(8).startswith(b"SSH-2.0")
        assert "direct-tcpip" in laptop.server.log or laptop.server.connections == 2
    finally:
        ssh.close(node)
