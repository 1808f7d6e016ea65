"""The job `download`: fetches one repository of the hub into a folder, resumes an interrupted download, and checks
the result.

Weights in pickles (`*.pt`) aren't fetched. For a gated repository the error says how to get access.
"""

import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from megatron_mixtral.errors import InputError, JobError
from megatron_mixtral.observability.events import EventLog
from megatron_mixtral.spec import rundir
from megatron_mixtral.spec.jobs import DownloadConfig
from megatron_mixtral.weights import hub

LEFT_BEHIND = ["*.pt", "*.pth", "*.bin", "*.msgpack", "*.h5", "*.onnx", "consolidated*"]
NOTES = Path(".cache", "huggingface")  # what huggingface_hub keeps in a folder that it fills


def run(config: DownloadConfig, run_dir: Path) -> None:
    output = Path(config.output).expanduser().absolute()
    fetch(config.repo, output, config.revision, EventLog(run_dir / rundir.EVENTS))
    print(f"{output}: complete", flush=True)


def fetch(repo: str, output: Path, revision: str | None, events: EventLog) -> None:
    """Fill `output`; `InputError` says what the user can do, and `JobError` means that a later try may succeed."""
    import huggingface_hub
    from huggingface_hub import errors

    if output.exists() and any(output.iterdir()) and not (output / NOTES).is_dir():
        raise InputError(f"{output}: holds something else, not a download; give a new folder")
    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
        files = {f.rfilename: f.size or 0 for f in info.siblings or () if not left_behind(f.rfilename)}
        _check(repo, files, output)
        events.write("progress", done=_present(files, output), total=sum(files.values()), unit="bytes")
        # Fetch by commit, so files of two revisions are never mixed.
        huggingface_hub.snapshot_download(repo, revision=info.sha, local_dir=output, ignore_patterns=LEFT_BEHIND)
    except errors.HFValidationError as error:
        raise InputError(f"{repo}: not a repository's name, owner/name: {error}") from error
    except errors.GatedRepoError as error:
        raise InputError(_gated(repo)) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{repo}: has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{repo}: not found. Check the name; if it's private, log in (`hf auth login`) or set HF_TOKEN"
        ) from error
    except Exception as error:
        if error.__class__.__module__.startswith("megatron_mixtral"):
            raise
        raise _fault(repo, output, error) from error
    for file, size in files.items():
        if not (output / file).is_file() or (output / file).stat().st_size != size:
            raise JobError(f"{output / file}: isn't whole; download again to resume")
    hub.read_headers(output)
    events.write("progress", done=sum(files.values()), total=sum(files.values()), unit="bytes")


def left_behind(file: str) -> bool:
    return any(fnmatch(file, pattern) for pattern in LEFT_BEHIND)


def _present(files: dict[str, int], output: Path) -> int:
    return sum(size for file, size in files.items() if (output / file).is_file())


def _check(repo: str, files: dict[str, int], output: Path) -> None:
    """Check that there are readable weights, and room for the rest."""
    if not any(file.endswith(".safetensors") for file in files):
        raise InputError(f"{repo}: has no *.safetensors; weights in pickles can run code, so they aren't fetched")
    parent = next(p for p in (output, *output.parents) if p.exists())
    needed, free = sum(files.values()) - _present(files, output), shutil.disk_usage(parent).free
    if needed > free:
        raise InputError(f"{parent}: {needed / 1e9:.1f} GB to download and {free / 1e9:.1f} GB free")


def _gated(repo: str) -> str:
    from huggingface_hub import constants

    return (
        f"{repo} is gated. 1. Open {constants.ENDPOINT}/{repo} in a browser, log in and accept its conditions. "
        f"2. Make a token that may read it at {constants.ENDPOINT}/settings/tokens. "
        "3. `hf auth login`, or set HF_TOKEN, and download again"
    )


def _fault(repo: str, output: Path, error: Exception) -> JobError:
    """The error for a failed download: network, disk, server, or a bad token."""
    status: Any = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return InputError(f"{repo}: the hub refuses this token ({status}). Log in again (`hf auth login`)")
    text = str(error).strip().split("\n", 1)[0] or type(error).__name__
    hint = "download again to resume; compute nodes often have no internet, the login node does"
    return JobError(f"{repo}: {text} ({hint}; so far in {output})")
