"""Fill a configuration's defaults from the schema and refuse what it can't mean, in one line.

Snakemake's own ``validate`` shares one default dict between siblings and reports in three lines,
so this goes over jsonschema by itself. Nothing here imports torch.
"""

import copy
import difflib
from pathlib import Path

import yaml

from headroom.errors import InputError


def load_schema(path: Path) -> dict:
    """Return the schema with its ``$defs`` references put in place (they hold no cycles)."""
    schema = yaml.safe_load(path.read_text())
    return _resolved(schema, schema.get("$defs", {}))


def _resolved(node: object, definitions: dict) -> object:
    if isinstance(node, list):
        return [_resolved(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        base = definitions[node["$ref"].rsplit("/", 1)[-1]]
        node = {**base, **{key: value for key, value in node.items() if key != "$ref"}}
    return {key: _resolved(value, definitions) for key, value in node.items() if key != "$defs"}


def filled(config: dict, schema: dict) -> dict:
    """Return a copy of the configuration with defaults filled in and every key checked.

    Raises:
        InputError: naming the key, what was given and what is allowed.
    """
    from jsonschema import Draft202012Validator

    result = _with_defaults(copy.deepcopy(config), schema)
    errors = list(Draft202012Validator(schema).iter_errors(result))
    if errors:
        raise InputError(
            _message(min(errors, key=lambda error: (len(error.path), str(error.path))))
        )
    return result


def _with_defaults(value: object, schema: dict) -> object:
    """Fill defaults from the top down; each gets a dict of its own."""
    if isinstance(value, dict):
        known = schema.get("properties", {})
        for key, part in known.items():
            if key not in value and "default" in part:
                value[key] = copy.deepcopy(part["default"])
        other = schema.get("additionalProperties")
        for key in value:
            part = known.get(key, other if isinstance(other, dict) else None)
            if part is not None:
                value[key] = _with_defaults(value[key], part)
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        return [_with_defaults(item, schema["items"]) for item in value]
    return value


def _message(error) -> str:
    key = ".".join(map(str, error.path)) or "(top level)"
    if error.validator == "additionalProperties":
        known = sorted(error.schema.get("properties", {}))
        unknown = sorted(set(error.instance) - set(known), key=str)[0]
        near = difflib.get_close_matches(str(unknown), known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        place = ".".join([*map(str, error.path), str(unknown)])
        return f"config key {place} is unknown{hint} (allowed: {', '.join(known)})"
    if error.validator == "required":
        missing = sorted(set(error.validator_value) - set(error.instance))[0]
        return f"config key {key} lacks {missing}: {_describe(error.schema, missing)}"
    if error.validator in ("oneOf", "anyOf") and isinstance(error.instance, dict):
        choices = [part["required"][0] for part in error.validator_value if "required" in part]
        given = sorted(set(choices) & set(error.instance))
        return (
            f"config key {key} needs exactly one of {', '.join(choices)}; it has {given or 'none'}"
        )
    return f"config key {key} is {error.instance!r}: {_allowed(error)}"


def _describe(schema: dict, name: str) -> str:
    return schema.get("properties", {}).get(name, {}).get("description", "it is required")


def _allowed(error) -> str:
    rule, limit = error.validator, error.validator_value
    words = {
        "enum": "allowed: " + ", ".join(map(str, limit)) if rule == "enum" else "",
        "minimum": f"at least {limit} is allowed",
        "maximum": f"at most {limit} is allowed",
        "exclusiveMinimum": f"it must be above {limit}",
        "exclusiveMaximum": f"it must be below {limit}",
        "pattern": f"it must match {limit}",
        "type": f"it must be {limit}",
        "minItems": f"at least {limit} entries are needed",
        "minProperties": f"at least {limit} entries are needed",
    }
    said = words.get(rule) or error.message
    if rule == "type" and isinstance(error.instance, str) and "number" in str(limit):
        said += " (YAML reads 3e-4 as a string: write 3.0e-4)"
    described = error.schema.get("description")
    return f"{said} ({described})" if described else said
