"""Fill a configuration's defaults from the schema and refuse what it can't mean, in one line.

Snakemake's own ``validate`` shares one default dict between siblings and reports in three lines,
so this goes over jsonschema by itself. Nothing here imports torch.
"""

import copy
import difflib
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from headroom.errors import SHOWN, InputError, shown

DEPTH = 16  # of keys in keys; the schema has 9
VALUES = 100_000  # that a configuration may hold: YAML's references multiply like rabbits
KINDS = {  # what YAML and JSON call a value, in words
    "string": "text",
    "number": "a number",
    "integer": "a whole number",
    "boolean": "true or false",
    "array": "a list",
    "object": "keys and values",
    "null": "null",
}


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


def plain(config: object) -> dict:
    """Return a copy of what was read from YAML or JSON, in which nothing is shared.

    Raises:
        InputError: for what no key can mean: not a number, dates, addresses with passwords, what is
            nested without end.
    """
    if not isinstance(config, dict):
        raise InputError(f"the configuration is {shown(config)} (allowed: keys and values)")
    return _plain(config, (), itertools.count())


def _plain(value: object, path: tuple, counted: Iterator[int]) -> object:
    if len(path) > DEPTH or next(counted) > VALUES:
        raise InputError(
            f"config key {_place(path[:4])}… is nested without end or holds too much (allowed: "
            f"{DEPTH} levels, {VALUES} values)"
        )
    if isinstance(value, dict):
        return {key: _plain(part, (*path, key), counted) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, (*path, place), counted) for place, part in enumerate(value)]
    if reason := _unusable(value):
        raise InputError(f"config key {_place(path)} {reason}")
    return value


def _unusable(value: object) -> str:
    """Why no key can have a value, without the value where it may be a secret; "" if one can."""
    if value is None or isinstance(value, bool | int):
        return ""
    if isinstance(value, float):
        allowed = "" if math.isfinite(value) else "allowed: a finite number"
        return allowed and f"is {value} ({allowed})"
    if not isinstance(value, str):
        kind = type(value).__name__
        return f"is a {kind}, as YAML reads it (allowed: quotes around it where text is meant)"
    if re.search(r"://[^/\s]*@", value):
        return (
            "holds an address with a user or password, which would stand in results (allowed: an "
            "address without; tokens and keys come from environment variables)"
        )
    if re.search("[\0\ud800-\udfff]", value):
        return "holds a NUL or half a character (allowed: text)"
    return ""


def _place(path: Iterable) -> str:
    return ".".join(str(key)[:SHOWN] for key in path) or "(top level)"


def filled(config: dict, schema: dict) -> dict:
    """Return a copy of the configuration with defaults filled in and every key checked.

    Raises:
        InputError: naming the key, what was given and what is allowed.
    """
    result = _with_defaults(plain(config), schema)
    errors = list(_validator()(schema).iter_errors(result))
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


def _validator():
    """Return a validator to which 2.0 is no whole number: it would stand in names of files."""
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend

    types = Draft202012Validator.TYPE_CHECKER.redefine(
        "integer", lambda _, value: isinstance(value, int) and not isinstance(value, bool)
    )
    return extend(Draft202012Validator, type_checker=types)


def _message(error) -> str:
    key, rule = _place(error.path), error.validator
    if "propertyNames" in error.schema_path:
        said = error.schema.get("description") or _allowed(error)
        return f"config key {key}: {shown(error.instance)} can't be a name there (allowed: {said})"
    if rule == "additionalProperties":
        known = sorted(error.schema.get("properties", {}))
        unknown = sorted(set(error.instance) - set(known), key=str)[0]
        near = difflib.get_close_matches(str(unknown), known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        place = _place([*error.path, unknown])
        return f"config key {place} is unknown{hint} (allowed: {', '.join(known)})"
    if rule == "required":
        missing = sorted(set(error.validator_value) - set(error.instance))[0]
        return f"config key {key} lacks {missing}: {_describe(error.schema, missing)}"
    choices = _choices(error)
    if choices and isinstance(error.instance, dict):
        given = sorted(set(choices) & set(error.instance))
        return (
            f"config key {key} needs exactly one of {', '.join(choices)}; it has {given or 'none'}"
        )
    return f"config key {key} is {shown(error.instance)}: {_allowed(error)}"


def _choices(error) -> list[str]:
    """The keys of which exactly one is wanted, where that is what was not met."""
    if error.validator in ("oneOf", "anyOf"):
        parts = error.validator_value
        return [part["required"][0] for part in parts] if all(map(_only_requires, parts)) else []
    if error.validator in ("minProperties", "maxProperties"):
        return list(error.schema.get("properties", {}))
    return []


def _only_requires(part: dict) -> bool:
    return list(part) == ["required"]


def _describe(schema: dict, name: str) -> str:
    return schema.get("properties", {}).get(name, {}).get("description", "it is required")


def _allowed(error) -> str:
    rule, limit = error.validator, error.validator_value
    described = error.schema.get("description")
    words = {
        "enum": lambda: "allowed: " + ", ".join(map(str, limit)),
        "minimum": lambda: f"at least {limit} is allowed",
        "maximum": lambda: f"at most {limit} is allowed",
        "exclusiveMinimum": lambda: f"it must be above {limit}",
        "exclusiveMaximum": lambda: f"it must be below {limit}",
        "pattern": lambda: f"it must match {limit}",
        "type": lambda: _kinds(limit, error.instance),
        "minItems": lambda: f"at least {limit} entries are needed",
        "maxItems": lambda: f"at most {limit} entries are allowed",
        "minProperties": lambda: f"at least {limit} entries are needed",
        "maxLength": lambda: f"at most {limit} characters are allowed",
        "uniqueItems": lambda: "each entry is allowed once",
    }
    said = words[rule]() if rule in words else "that is not allowed"
    return f"{said} ({described})" if described else said


def _kinds(kinds: str | list[str], value: object) -> str:
    """What kind of value is wanted, and why YAML may have read another than was meant."""
    wanted = [kinds] if isinstance(kinds, str) else kinds
    said = "it must be " + " or ".join(KINDS[kind] for kind in wanted)
    if isinstance(value, str) and {"number", "integer"} & set(wanted):
        return f"{said} (YAML reads 3e-4 and 0,05 as text: write 3.0e-4 and 0.05)"
    if isinstance(value, bool) and "string" in wanted:
        return f"{said} (YAML reads yes, no, on and off as true or false: put text in quotes)"
    return said
