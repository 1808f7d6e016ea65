"""The serve job with vLLM in place of our engine: an export if one is needed, and the same run directory around it.

One process a job; vLLM starts its own, one a GPU. The key goes to it through the environment, never by argv.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from megatron_mixtral import signals
from megatron_mixtral.errors import InputError, JobError
from megatron_mixtral.observability.events import EventLog
from megatron_mixtral.serve import announce, setup
from megatron_mixtral.spec import checks, rundir
from megatron_mixtral.spec.jobs import ConvertConfig, ServeConfig
from megatron_mixtral.spec.shape import MixtralShape
from megatron_mixtral.weights import folder as weights_folder
from megatron_mixtral.weights.convert import convert

PROGRAM = "vllm"
POLL_SECONDS = 0.5
GRACE_SECONDS = 10.0  # beyond the drain, before it is ended by force
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def run(config: ServeConfig, run_dir: Path) -> None:
    """Serve `config.model` by vLLM until told to stop; `InputError` before anything starts when it can't."""
    program = shutil.which(PROGRAM)
    if program is None:
        raise InputError(f"{PROGRAM} isn't installed where this job runs; name an image that has it, or install it")
    key = setup.checked_key(config)
    checks.check(config)
    found = weights_folder.find(Path(config.model))
    log = EventLog(run_dir / rundir.EVENTS)
    folder = found if weights_folder.is_hub(found) else exported(found, config, run_dir)
    config = setup.within_context(config, MixtralShape.from_folder(folder))
    listener = setup.listener(config)
    port = listener.getsockname()[1]
    listener.close()  # vLLM binds it again in a moment
    name = config.name or setup.served_name(found)
    server = Child([program, *arguments(folder, config, name=name, port=port)], key=key)
    address = announce.Address(
        run_dir=run_dir, host=config.host, port=port, wanted=config.port, key=key is not None
    )
    try:
        if server.until_healthy(f"http://{announce.reachable(config.host)}:{port}/health"):
            address.announce(log, model=name, weights=folder)
        code = server.wait(config.drain_seconds)
    finally:
        address.remove()
    log.write("exit", code=0 if server.told else 1, reason="stopped" if server.told else f"{PROGRAM} ended: {code}")
    if not server.told:
        raise JobError(f"{PROGRAM} ended by itself with {code}; its own words are above")


def exported(found: Path, config: ServeConfig, run_dir: Path) -> Path:
    """The weights in the hub's layout, made unless an earlier job made them."""
    assert config.exports is not None, "the launcher says where exports go"
    step = f"-{found.name}" if found.name.startswith("iter_") else ""
    output = Path(config.exports) / f"{setup.served_name(found)}{step}-hf"
    signals.listen_in_a_job()
    convert(ConvertConfig(source=str(found), output=str(output), to="hf", base=config.base), run_dir)
    return output


def arguments(folder: Path, config: ServeConfig, *, name: str, port: int) -> list[str]:
    """What `vllm` is told."""
    layout = config.layout
    options = {
        "host": config.host,
        "port": port,
        "served-model-name": name,
        "dtype": DTYPES[config.precision],
        "max-model-len": config.max_tokens,
        "max-num-seqs": config.max_batch,
        "tensor-parallel-size": layout.tensor,
        "pipeline-parallel-size": layout.pipeline,
    }
    spread = ["--enable-expert-parallel"] if layout.expert > 1 else []
    return ["serve", str(folder), *(word for n, v in options.items() for word in (f"--{n}", str(v))), *spread]


class Child:
    """vLLM and all that it starts, in a process group of its own; our signals become its SIGTERM."""

    def __init__(self, argv: list[str], *, key: str | None) -> None:
        environment: Mapping[str, str] = {**os.environ, **({"VLLM_API_KEY": key} if key else {})}
        self.told = False
        self._process = subprocess.Popen(argv, env=environment, start_new_session=True)
        setup.on_signal(self._stop)

    def _stop(self) -> None:
        self.told = True
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def until_healthy(self, url: str) -> bool:
        """False when it ended first."""
        while self._process.poll() is None:
            try:
                with urllib.request.urlopen(url, timeout=5):
                    return not self.told
            except (urllib.error.URLError, OSError):
                time.sleep(POLL_SECONDS)
        return False

    def wait(self, drain_seconds: float) -> int:
        """Its exit code; once it was told to stop it has the drain's time and a little more."""
        deadline = None
        while (code := self._process.poll()) is None:
            time.sleep(POLL_SECONDS / 5)
            if self.told and deadline is None:
                deadline = time.monotonic() + drain_seconds + GRACE_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                self._process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # whatever it left behind
        return code
