"""Values that break what isn't quoted, and every place where a user can put text."""

from collections.abc import Iterator

from megatron_mixtral.spec.jobs import JOBS
from megatron_mixtral.spec.options import own

CANARY = "canary"
CARRIED = [
    "plain",
    "two words",
    "  blanks around  ",
    "it's",
    'a "quoted" word',
    "'",
    '"',
    "\\",
    "back\\slash",
    "mixed \\\" \\' ends\\\\",
    "semi; touch canary",
    "and && touch canary",
    "pipe | touch canary",
    "$(touch canary)",
    "`touch canary`",
    "> canary",
    "& touch canary &",
    "#hash",
    "word #hash",
    "%j %x %% 100%",
    "*",
    "?[a-z]{1,2}",
    "~",
    "!history",
    "-leading",
    "--nodes=9",
    "=equals=",
    "comma,colon:at@",
    "END_OF_CONFIG",
    "END_OF_RANK",
    "#SBATCH --nodes=9",
    "ünïcödé ✓ 漢字 🐙",
    "x" * 1000,
]
HOSTILE = [
    *CARRIED,
    "x" * 10_000,
    "new\nline; touch canary",
    "carriage\rreturn",
    "tab\there",
    "nul\0",
    "escape\x1b[31m",
    "",
    "$HOME",
    "${HOME}; touch canary",
    "{{ 7 * 7 }}",
    "{% raw %}",
    "..",
]
# Options that take text, by the key of the configuration in which they arrive; None: in no configuration. Settings
# that take text are found by themselves.
PATH, TEXT, NAME = "path", "text", "name"
FIELDS: dict[str, dict[str, tuple[str, str | None]]] = {
    "tiny": {"--output": (PATH, "output")},
    "download": {"REPO": (NAME, "repo"), "--output": (PATH, "output"), "--revision": (TEXT, "revision")},
    "prepare": {
        "FILES": (PATH, "inputs"),
        "--model": (PATH, "tokenizer"),
        "--output": (PATH, "output"),
    },
    "convert": {
        "--model": (PATH, "source"),
        "--output": (PATH, "output"),
    },
    "finetune": {"--model": (PATH, "model"), "--data": (PATH, "data")},
    "verify": {"DIR": (PATH, "folder"), "--model": (PATH, "folder")},
    "serve": {"--model": (PATH, "model"), "--host": (TEXT, "host")},
}
EVERY_JOB = {"--name": (NAME, None), "--time": (NAME, None)}
OF_PROFILE = (
    *("description", "account", "partition", "qos", "reservation", "constraint", "comment", "time", "python"),
    *("environment.X", "secrets", "paths.models", "paths.data", "paths.runs", "slurm_version", "slurm_conf"),
    *("serve.host", "login.host", "container.image", "container.mounts", "binding.cpu", "binding.memory"),
    *("binding.gpu", "binding.distribution", "templates.rank", "extra.mail-user", "node.gpu_type", "name"),
)


def fields(job: str) -> Iterator[tuple[str, str, str | None]]:
    """(option, kind, key of the configuration) of every option of `job` that takes text."""
    known = {**FIELDS[job], **EVERY_JOB}
    for setting in own(JOBS[job]):
        if setting.kind is str and not setting.choices:
            kind = PATH if setting.name in ("base", "chat_template") else TEXT
            known.setdefault(setting.flag, (kind, setting.name))
    for option, (kind, key) in known.items():
        yield option, kind, key


def typed(option: str, kind: str, value: str, folder: str) -> str:
    """The value as it is typed: a path lies in `folder`."""
    return f"{folder}/{value}" if kind == PATH else value
