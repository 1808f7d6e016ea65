"""The options of every job command, built once and shared by submission, `plan`, `export` and `rehearse`.

They don't import the code that plans and submits, so help, completion and usage errors are fast.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import click

from launcher.cli import completion
from megatron_mixtral.spec.jobs import JOBS, ConvertConfig, ServeConfig
from megatron_mixtral.spec.layout import Layout
from megatron_mixtral.spec.options import Option, SpecError, options, own
from megatron_mixtral.spec.shape import MODEL

PARALLEL = ("convert", "finetune", "serve")
SHARED = ("convert", "verify")  # their processes share the bytes, so any number of nodes works
HELP = {  # a line for the list of commands, and the rest of the help
    "tiny": "Make a small Mixtral with random weights.\n\nIt has the hub's layout and Mixtral's own tokenizer.",
    "download": "Fetch a model from the hub.\n\nIt goes into the cluster's models folder; run it again to resume.",
    "prepare": "Tokenize text for training.\n\nFILES of text or conversations become Megatron's .bin and .idx.",
    "convert": "Convert weights, to Megatron's layout or back.\n\nOne conversion serves every parallel layout.",
    "verify": "Check a converted folder against its digests.\n\nEvery tensor in DIR must have its recorded digest.",
    "finetune": "Train on prepared data.\n\nIt starts from converted weights, or from a run's newest checkpoint.",
    "serve": "Serve a model over HTTP.\n\nIt answers OpenAI's and Megatron's requests, and has a chat page.",
}


class SectionedOption(click.Option):
    """An option that `--help` lists under its own heading."""

    def __init__(self, *args: Any, section: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class SectionedCommand(click.Command):
    """A command whose help has sections."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)):
                sections.setdefault(getattr(parameter, "section", "Options"), []).append(record)
        for section, records in sections.items():
            with formatter.section(section):
                formatter.write_dl(records)


class CommandWithOthers(SectionedCommand):
    """A command with subcommands: its first word is the name of a subcommand, or else its model."""

    def __init__(
        self, name: str, *, under: Sequence[click.Command], params: list[click.Parameter], **parts: Any
    ) -> None:
        self.commands = {str(command.name): command for command in under}
        metavar = f"[MODEL | {'|'.join(self.commands)} ...]"
        words = click.Argument(["words"], nargs=-1, metavar=metavar, shell_complete=self._offered)
        super().__init__(name, params=[words, *params], **parts)

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if not args or args[0] not in self.commands:
            return super().make_context(info_name, args, parent, **extra)
        name, *rest = args
        return self.commands[name].make_context(f"{info_name} {name}", rest, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        if words := ctx.params.pop("words"):
            ctx.params["model"] = self._model(ctx, *words)
        return super().invoke(ctx)

    def _model(self, ctx: click.Context, word: str, *more: str) -> str:
        if word in self.commands:  # an option before it would have no effect
            typed = [p for p in ctx.params if ctx.get_parameter_source(p) == click.core.ParameterSource.COMMANDLINE]
            first = next((p.opts[0] for p in self.params if p.name in typed), "--")
            raise click.UsageError(f"{first} goes behind `{self.name} {word}`", ctx=ctx)
        if more:
            raise click.UsageError(f"Got unexpected extra argument ({more[0]})", ctx=ctx)
        if ctx.params["model"] is not None:
            raise click.UsageError(f"{word!r} and --model: give one of them", ctx=ctx)
        return word

    def _offered(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
        return [name for name in self.commands if name.startswith(incomplete)]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        with formatter.section("Commands"):
            formatter.write_dl([(name, other.get_short_help_str()) for name, other in self.commands.items()])


FORCE = SectionedOption(
    ["--force"],
    section="Job",
    is_flag=True,
    help="Submit even if the memory estimate says that the job doesn't fit.",
)


class OptionType(click.ParamType):  # type: ignore[type-arg]  # generic only in newer versions of click
    """An option's own check, so the command line and programs get the same message."""

    name = "value"

    def __init__(self, option: Option) -> None:
        self.option = option

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.option.checked(value)
        except SpecError as error:
            raise click.UsageError(error.said(lambda _: self.option.flag), ctx=ctx) from None


def job_command(
    job: str,
    action: Callable[..., None],
    *,
    more: tuple[click.Parameter, ...] = (),
    under: tuple[click.Command, ...] = (),
) -> click.Command:
    """The command of `job`, with others `under` it. `action` gets the job, the options, and `more` by name."""
    names = [str(parameter.name) for parameter in more]

    def callback(**typed: Any) -> None:
        own = {name: typed.pop(name) for name in names}
        action(job, typed, **own)

    parts: dict[str, Any] = {
        "callback": callback,
        "params": [*_WHAT[job](), *_layout(job), *_job(job), *more, *map(_setting, own(JOBS[job]))],
        "help": HELP[job],
        "context_settings": {"max_content_width": 110},
    }
    return CommandWithOthers(job, under=under, **parts) if under else SectionedCommand(job, **parts)


def _option(section: str, name: str, help: str, default: str = "", **rest: Any) -> click.Option:
    """An option without a value of its own; `default` only says what the plan does without it."""
    return SectionedOption(
        [name], section=section, help=f"{help}  [default: {default}]" if default else help, **rest
    )


def override(section: str = "Options") -> click.Option:
    """`-o KEY=VALUE` of every command about one cluster."""
    names = ["-o", "override"]
    help = "Replaces a key of the profile, such as -o node.gpus=4; can be repeated."
    return SectionedOption(
        names, section=section, multiple=True, metavar="KEY=VALUE", help=help, shell_complete=completion.keys
    )


def _env() -> click.Option:
    names, help = ["--env"], "Variable of your environment that the job gets as a secret; can be repeated."
    return SectionedOption(
        names, section="Job", multiple=True, metavar="NAME", help=help, shell_complete=completion.variables
    )


def _what(name: str, help: str, default: str = "", **rest: Any) -> click.Option:
    return _option("What", name, help, default, **rest)


def _model(help: str = "Repository, path, or name of a run.") -> click.Option:
    return _what("--model", help, MODEL)


def _tiny() -> list[click.Parameter]:
    return [_what("--output", "Folder to write.", metavar="DIR", required=True)]


def _download() -> list[click.Parameter]:
    return [
        click.Argument(["model"], metavar="[REPO]", required=False),
        _what("--output", "Where to.", "the models folder", metavar="DIR"),
        _what("--revision", "Branch, tag or commit."),
    ]


def _prepare() -> list[click.Parameter]:
    return [
        click.Argument(["files"], nargs=-1, required=True, metavar="FILES..."),
        _model("Model whose tokenizer is used: repository or path."),
        _what("--output", "Prefix of the two files.", "finetune, in the data folder", metavar="PREFIX"),
    ]


def _convert() -> list[click.Parameter]:
    return [
        _model(),
        _what("--to", "Layout to write.", "megatron", type=click.Choice(options(ConvertConfig)["to"].choices)),
        _what("--output", "Where to.", "the models folder", metavar="DIR"),
        _processes(),
    ]


def _verify() -> list[click.Parameter]:
    return [
        click.Argument(["folder"], metavar="[DIR]", required=False),
        _what("--model", "Instead of DIR: the conversion of a repository, or a run.", MODEL),
        _processes(),
    ]


def _processes() -> click.Option:
    help = "Processes on each node that share the work.  [default: 1 here, 8 on a cluster]"
    return SectionedOption(["-j", "--processes"], section="What", help=help, **_whole("processes"))


def _finetune() -> list[click.Parameter]:
    help = "Prefix that `prepare` wrote; repeat it to blend data sets, with weights if given."
    return [
        _model(),
        _what(
            "--data",
            help,
            "finetune, in the data folder",
            metavar="PREFIX[:WEIGHT]",
            multiple=True,
            callback=lambda _context, _option, given: given[0] if len(given) == 1 else given or None,
        ),
    ]


def _serve() -> list[click.Parameter]:
    return [
        _model(),
        _what("--host", "Address to listen on.", "the profile's"),
        _what("--port", "Port to listen on.", "the profile's", **_whole("port", options(ServeConfig)["port"].most)),
    ]


_WHAT: dict[str, Callable[[], list[click.Parameter]]] = {
    "tiny": _tiny,
    "download": _download,
    "prepare": _prepare,
    "convert": _convert,
    "verify": _verify,
    "finetune": _finetune,
    "serve": _serve,
}


def _layout(job: str) -> list[click.Parameter]:
    if job not in PARALLEL:
        return []
    help = "train is TP1 EP8 PP4, inference is TP1 EP1 PP2."
    preset = _option("Layout", "--preset", help, type=click.Choice(["train", "inference"]))
    axes: list[click.Parameter] = [_setting(axis, "Layout") for axis in options(Layout).values()]
    return [preset, *axes] if job == "convert" else axes


def _job(job: str) -> list[click.Parameter]:
    """The options of every job."""
    cluster = "$MIXLAUNCH_CLUSTER, else local"
    fewest = "1" if job in SHARED else "the fewest that the layout needs"
    nodes = _option("Job", "--nodes", "Whole nodes.", fewest, **_whole("nodes"))
    return [
        _option(
            "Job",
            "--cluster",
            "Profile of the cluster.",
            cluster,
            metavar="NAME|FILE.yaml",
            shell_complete=completion.clusters,
        ),
        override("Job"),
        _env(),
        *([nodes] if job in (*PARALLEL, *SHARED) else []),
        _option("Job", "--name", "Name of the run.", job),
        _option("Job", "--time", "Minutes, HH:MM:SS or D-HH:MM:SS.", "the profile's", metavar="LIMIT"),
    ]


def setting_key(option: Option) -> str:
    """Options of a field and a command's own never share a name."""
    return f"set_{option.name}"


def _setting(option: Option, section: str = "Settings") -> click.Option:
    """The option that fills in a field of the job's configuration, or of its layout."""
    names, given = (
        [option.flag, setting_key(option)],
        dict[str, Any](section=section, default=None, help=option.help),
    )
    if option.kind is bool and option.default:
        names[0] += f"/--no-{option.flag.removeprefix('--')}"
        given["help"] += "  [default: on]"
    elif option.kind is bool:
        given["is_flag"] = True
    else:
        given |= _typed(option)
        if option.default is not None and section == "Settings":
            given["help"] += f"  [default: {plain(option.default)}]"
    return SectionedOption(names, **given)


def _typed(option: Option) -> dict[str, Any]:
    if option.choices:
        return {"type": click.Choice(option.choices)}
    return {"type": OptionType(option), "metavar": {int: "N", float: "X", str: "TEXT"}[option.kind]}


def _whole(name: str, most: float = math.inf) -> dict[str, Any]:
    """Type and metavar of an option that takes a positive whole number."""
    return _typed(Option(name=name, kinds=(int,), help="", least=1, most=most))


def plain(value: Any) -> str:
    """As people write it: `1e-4`, not `0.0001`; `20`, not `20.0`."""
    if isinstance(value, float) and 0 < value < 1e-3:
        return re.sub(r"e-0*", "e-", f"{value:.0e}")
    return f"{value:g}" if isinstance(value, float) else str(value)
