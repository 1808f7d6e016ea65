"""A job of one process run here and now, in the terminal's foreground: `download` on a login node.

It reads its configuration from a folder that is gone afterwards; there is no run directory and nothing to look up.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from launcher.errors import UsageError
from launcher.host import ssh
from launcher.host.ssh import Login
from launcher.planning import inputs, secrets
from launcher.planning.jobs import JobPlan
from launcher.script import render

INTERRUPTED = 130
END = "mixlaunch-ended"
SCRIPT = """
folder=$(mktemp -d) || exit
trap 'rm -rf "$folder"' EXIT
trap 'exit 1' HUP PIPE
printf %s {config} >"$folder/config.yaml" || exit
{exports}
cd "$folder" || exit
{python} -P -m megatron_mixtral {job} --config "$folder/config.yaml" 2>&1
echo "{end} $?"
"""


def run(plan: JobPlan) -> int:
    """Run `plan`'s job by this interpreter and return its exit code. Ctrl-C goes to it; what it fetched stays."""
    inputs.require_file_system(plan)
    secrets.require(plan)
    if login := plan.profile.login_node:
        return _run_there(plan, login)
    with tempfile.TemporaryDirectory(prefix="mixlaunch-") as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(render.config_text(plan))
        argv = [sys.executable, "-P", "-m", "megatron_mixtral", plan.job, "--config", str(config)]
        with subprocess.Popen(argv) as process:
            try:
                return process.wait()
            except KeyboardInterrupt:
                process.wait()
                return INTERRUPTED


def _run_there(plan: JobPlan, login: Login) -> int:
    """The same on the login node, by the profile's Python. When the connection ends its next word is its last."""
    if plan.profile.in_container:
        raise UsageError(f"{plan.job}: its Python is in a container; give --as-job, or run it on {login.host}")
    variables = {name: os.environ[name] for name in secrets.carried(plan)}
    body = SCRIPT.format(
        exports=ssh.exports(variables),
        config=shlex.quote(render.config_text(plan)),
        python=shlex.quote(plan.profile.python),
        job=shlex.quote(plan.job),
        end=END,
    )
    process = ssh.stream(login, body)
    assert process.stdout
    try:
        for line in process.stdout:
            if line.startswith(END.encode()):
                return int(line.split()[1])
            sys.stdout.buffer.write(line)
            sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        ssh.end(process)
    raise ssh.LostError(f"login node {login.host}: the connection was lost; what was fetched is kept")
