"""The commands about cluster profiles.

They read profiles and ask Slurm; none of them submits anything.
"""

import click


@click.group(invoke_without_command=True)
@click.pass_context
def clusters(ctx: click.Context) -> None:
    """List cluster profiles, or show one."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(clusters_list)


@clusters.command("list")
def clusters_list() -> None:
    """Every profile that --cluster can name."""
    from launcher import overview

    overview.clusters()


@clusters.command("show")
@click.argument("name", required=False)
def clusters_show(name: str | None) -> None:
    """A profile as it is understood: variables expanded, defaults filled in."""
    import yaml

    from launcher import profile, screen

    path = profile.find(name or profile.default())
    shown = profile.read(path).model_dump(mode="json", exclude_none=True)
    click.echo(f"# {path}", err=True)
    screen.code(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True), "yaml")
