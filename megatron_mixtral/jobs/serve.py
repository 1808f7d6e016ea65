"""The job `serve`: a model behind HTTP, computed by our engine or by vLLM."""

import os
from pathlib import Path

from megatron_mixtral.serve import setup, vllm
from megatron_mixtral.spec.jobs import ServeConfig


def run(config: ServeConfig, run_dir: Path) -> None:
    """Serve `config.model` until a stop signal; `InputError` before anything is loaded if it can't be served."""
    if config.engine == "vllm":
        vllm.run(config, run_dir)
        return
    checked = setup.checked(config)
    listener = setup.listener(config) if checked.rank == 0 else None
    if listener and config.port and (port := listener.getsockname()[1]) != config.port:
        print(f"port {config.port} is in use; this server uses {port}", flush=True)
    setup.on_signal(lambda: os._exit(0))  # nobody waits for an answer while it imports and loads
    # Imported here, because an environment for vLLM may lack the torch and megatron-core that it needs.
    from megatron_mixtral.serve import server

    server.run(checked, run_dir, listener)
