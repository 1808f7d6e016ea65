"""The JSON schema of a profile, with which editors complete and check keys.

It is the model's schema, plus what a file may have: `extends`, optional names, $VARIABLES, and null.
"""

from typing import Any

from launcher.cluster.profile import ClusterProfile

DIALECT = "https://json-schema.org/draft/2020-12/schema"
REFERENCE = {"type": "string", "pattern": r"\$"}  # `gpus: $GPUS` is a number when the profile is read
EXTENDS = {
    "type": "string",
    "description": "the parent profile, by name or relative path: sections merge key by key",
}


def schema() -> dict[str, Any]:
    """The schema of one file."""
    made = ClusterProfile.model_json_schema()
    sections = made.pop("$defs")
    for section in (made, *sections.values()):
        section["properties"] = {name: _told(value) for name, value in section["properties"].items()}
    required = [name for name in made.pop("required") if name != "name"]
    of_paths = sections["Paths"].pop("required")
    made["properties"] = {"extends": EXTENDS, **made["properties"]}
    whole = {"required": required, "properties": {"paths": {"required": of_paths}}}
    head = {"$schema": DIALECT, "title": "mixlaunch cluster profile", "type": "object"}
    return {
        **head,
        **made,
        "title": head["title"],
        "if": {"required": ["extends"]},
        "else": whole,
        "$defs": sections,
    }


def _told(value: dict[str, Any]) -> dict[str, Any]:
    """A key's schema in a file: its value, a $VARIABLE, or null, which removes the parent's value."""
    if "$ref" in value:
        return value  # a section: its keys are what matters
    about = {name: told for name, told in value.items() if name in ("description", "default")}
    return {**about, "anyOf": [*_kinds(value), REFERENCE, {"type": "null"}]}


def _kinds(value: dict[str, Any]) -> list[dict[str, Any]]:
    bare = {name: told for name, told in value.items() if name not in ("description", "default", "title")}
    kinds = bare.get("anyOf", [bare])
    return [_emptied(kind) for kind in kinds if kind != {"type": "null"}]


def _emptied(kind: dict[str, Any]) -> dict[str, Any]:
    """A mapping of names may also hold null, which removes the parent's value."""
    values = kind.get("additionalProperties")
    return {**kind, "additionalProperties": {"anyOf": [values, {"type": "null"}]}} if values else kind
