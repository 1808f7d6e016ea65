"""The schema that editors take: it accepts what reads, and points at what doesn't."""

import json

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from launcher.cli.main import cli
from launcher.cluster import catalog, json_schema, profile, yaml_layers


@pytest.fixture(scope="module")
def validator():
    schema = json_schema.schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def mistakes(validator, text: str) -> str:
    return "; ".join(e.message for e in validator.iter_errors(yaml.load(text, Loader=yaml_layers.PlainLoader)))


def test_every_built_in_profile_fits(validator):
    for path in catalog.available().values():
        assert mistakes(validator, path.read_text()) == "", path


@pytest.mark.parametrize(
    "text",
    [
        "extends: selene\naccount: me\nnode: {gpus: 4}",
        "extends: selene\npaths: {runs: /r}\naccount: ~\nenvironment: {A: 1, B: x, C: ~}",
        "extends: selene\ntime: 90\nextra: {mail-type: END, contiguous: true}\nslurm_version: 23.11",
        "extends: selene\nexclusive: $WHOLE\nsignal_lead: ${LEAD}",
    ],
)
def test_what_reads_fits(validator, text, tmp_path, monkeypatch):
    monkeypatch.setenv("WHOLE", "true")
    monkeypatch.setenv("LEAD", "60")
    (tmp_path / "mine.yaml").write_text(text)
    assert mistakes(validator, text) == ""
    if "environment" not in text:  # a null that takes nothing away is no text
        profile.read(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("extends: x\npartitoin: y", "'partitoin' was unexpected"),
        ("extends: x\nnode: {gpuz: 8}", "'gpuz' was unexpected"),
        ("extends: x\ngpu_request: many", "is not valid"),
        ("extends: x\nnode: {gpus: -1}", "is not valid"),
        ("scheduler: slurm", "'paths' is a required property"),
        ("scheduler: slurm\npaths: {models: /m, data: /d}", "'runs' is a required property"),
    ],
)
def test_a_mistake_is_pointed_at(validator, text, said):
    assert said in mistakes(validator, text)


def test_the_command_prints_it():
    assert json.loads(CliRunner().invoke(cli, ["clusters", "schema"]).stdout) == json_schema.schema()


def test_list_and_show_in_json(write_profile, tmp_path, monkeypatch):
    broken = tmp_path / "clusters"
    broken.mkdir()
    (broken / "broken.yaml").write_text("partitoin: x")
    monkeypatch.setenv("MIXLAUNCH_CLUSTERS", str(broken))
    listed = {c["name"]: c for c in json.loads(CliRunner().invoke(cli, ["clusters", "list", "--json"]).stdout)}
    assert listed["local"]["default"] is True
    assert listed["selene"]["profile"]["node"]["gpus"] == 8
    assert "unknown key 'partitoin'" in listed["broken"]["error"]
    shown = CliRunner().invoke(
        cli, ["clusters", "show", "selene", "--json", "-o", "node.gpus=4", "-o", "account=me"]
    )
    assert json.loads(shown.stdout)["node"]["gpus"] == 4
    assert json.loads(shown.stdout)["account"] == "me"


def test_a_part_of_the_template_can_be_copied():
    run = CliRunner().invoke
    assert "container_pyxis" in run(cli, ["clusters", "template"]).stdout.split()
    assert "--container-image=" in run(cli, ["clusters", "template", "container_pyxis"]).stdout
    refused = run(cli, ["clusters", "template", "container_pyxs"])
    assert (refused.exit_code, "did you mean 'container_pyxis'?" in refused.stderr) == (2, True)
