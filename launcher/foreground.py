"""A job of one process run here and now, in the terminal's foreground: `download` on a login node.

It reads its configuration from a folder that is gone afterwards; there is no run directory and nothing to look up.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from launcher import inputs, render, secrets_env
from launcher.jobs import JobPlan


def run(plan: JobPlan) -> int:
    """Run `plan`'s job by this interpreter and return its exit code. Ctrl-C goes to it; what it fetched stays."""
    inputs.require_file_system(plan)
    secrets_env.require(plan)
    with tempfile.TemporaryDirectory(prefix="mixlaunch-") as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(render.config_text(plan))
        argv = [sys.executable, "-P", "-m", "megatron_mixtral", plan.job, "--config", str(config)]
        with subprocess.Popen(argv) as process:
            try:
                return process.wait()
            except KeyboardInterrupt:
                process.wait()
                return 130
