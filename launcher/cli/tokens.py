"""`tokens`: a conversation as a model's tokens. The core prints it, run by the cluster profile's Python."""

import os
import sys

import click

from launcher.cli import completion
from launcher.cluster import paths, profile
from launcher.errors import UsageError

TEMPLATE_OF_MISTRAL = "mistral"


@click.command("tokens")
@click.argument("model")
@click.argument("file", required=False)
@click.option("--chat-template", metavar="FILE", help="Jinja file, or mistral; the model's own unless given.")
@click.option("--count", type=click.IntRange(1, 1000), default=1, show_default=True, help="Rows of FILE to show.")
@click.option(
    "--cluster",
    metavar="NAME|FILE.yaml",
    help="Profile of the cluster.  [default: $MIXLAUNCH_CLUSTER, else local]",
    shell_complete=completion.clusters,
)
def tokens(model: str, file: str | None, chat_template: str | None, count: int, cluster: str | None) -> None:
    """Show a conversation as a model's tokens.

    It prints the tokens of a sample, or of the first rows of FILE: their names, their ids, and between guillemets
    what training learns. Where transformers gives other ids, it shows them as well.
    """
    loaded = profile.load(cluster)
    host = loaded.host
    if host.python is None and loaded.in_container:
        raise UsageError(f"tokens: its Python is in a container; run it on {host.name}")
    argv = [
        host.python or loaded.python,
        "-P",
        "-m",
        "megatron_mixtral.jobs.tokens",
        paths.hub_folder(loaded, model),
    ]
    argv += [paths.path(file, "FILE")] if file is not None else []
    if chat_template is not None:
        known = chat_template == TEMPLATE_OF_MISTRAL
        argv += ["--chat-template", chat_template if known else paths.path(chat_template, "--chat-template")]
    argv += ["--count", str(count)]
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        argv.append("--colour")
    if code := host.attend(argv, {}, {}):
        sys.exit(code)


COMMANDS = (tokens,)
