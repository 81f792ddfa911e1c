"""What may be in the record of a heads artifact (`locret.heads.heads.HeadsConfig`)."""

from collections.abc import Collection, Mapping
from typing import Any, get_args, get_origin

from locret.heads.quotas import quotas_of


def wrong_values(
    values: Mapping[str, Any], kinds: Mapping[str, Any], choices: Mapping[str, Collection[str]]
) -> list[str]:
    """What is wrong with the values of a record, in words, by the types of all its fields and what
    the words of some may be (`choices`)."""
    wrong = []
    at_least = {"query_tokens": 0}
    for name, kind in kinds.items():
        value = values[name]
        if name == "quotas":
            wrong += _wrong_quotas(values)
        elif not _is_a(value, kind):
            wrong.append(f"{name} is {value!r}, expected {kind}")
        elif type(value) is int and value < at_least.get(name, 1):
            wrong.append(f"{name} is {value}, expected at least {at_least.get(name, 1)}")
        elif name in choices and value not in choices[name]:
            wrong.append(f"{name} {value!r} is unknown; expected one of {sorted(choices[name])}")
    return wrong or _wrong_shape(values)


def _wrong_shape(values: Mapping[str, Any]) -> list[str]:
    """What fields that are right by themselves have against each other."""
    kind, width, sinks = (values[name] for name in ("kind", "width", "sinks"))
    wrong = []
    if (kind == "linear") != (width is None) or (kind == "gate") != (sinks is not None):
        wrong.append(
            f"width is {width} and sinks {sinks} with kind {kind!r}; expected a width but for "
            "linear heads, and sinks for gates alone"
        )
    queries, heads = values["num_query_heads"], values["num_kv_heads"]
    if kind == "gate" and (queries is None or queries % heads):
        wrong.append(f"num_query_heads is {queries}; a gate needs a multiple of {heads} KV heads")
    return wrong


def _wrong_quotas(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with the quotas of a record; none are right for heads of any shape."""
    given = values["quotas"]
    if given is None:
        return []
    if not (isinstance(given, dict) and all(isinstance(table, list) for table in given.values())):
        return [f"quotas are a {type(given).__name__}, expected lists of lists by compression"]
    try:
        quotas = quotas_of(given)
        if quotas is not None:
            quotas.check_shape(values["num_layers"], values["num_kv_heads"])
    except ValueError as error:
        return [str(error)]
    return []


def _is_a(value: Any, kind: Any) -> bool:
    if get_origin(kind) is dict:
        _, of = get_args(kind)
        numbers = (int, float) if of is float else of
        return isinstance(value, dict) and all(isinstance(v, numbers) for v in value.values())
    return isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
