"""Parses a body into a checked object: UTF-8, JSON, fields of the right types.

Parsing may run in a thread, and no single step of it may keep the event loop's thread waiting for long. So a body is
first cut into raw fields, and a list of prompts into raw prompts, which is cheap. Only fields that are needed and not
too long are then made into Python objects.
"""

from __future__ import annotations

import json
import logging
import re
from typing import Any, NoReturn, TypeVar

import msgspec
from pydantic import BaseModel, ValidationError

from fastblt.server.api.errors import ApiError
from fastblt.server.request import InvalidRequestError

#: Choices of one call, over all its prompts.
MAX_CHOICES = 128
#: Ids that the prompts of one call may have together, each counted once a choice.
MAX_PROMPT_IDS = 2**20
#: Bytes of a body without its prompts.
MAX_FIELDS_BYTES = 256 * 2**10
#: Lists and objects within one field other than the prompts. They take far longer to make than other values.
_MAX_LISTS = 2**15
#: Most bytes that one id takes in a body, as clients write it: `\\u0041` in a text, `259, ` in a list.
_ID_BYTES = 6

#: Unknown fields that a response names, and characters of each name.
_MAX_IGNORED = 16
_MAX_NAME = 64
#: Names of unknown fields that are logged over the server's life.
_MAX_LOGGED = 256

#: An escape of one half of a surrogate pair, where the other one does not stand beside it.
_HALF = re.compile(
    rb"\\u[dD](?:[89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD])[c-fC-F][0-9a-fA-F]{2})"
)
#: Bytes that are looked through at a time: some 20 ms.
_PIECE_BYTES = 2**20
#: What two escapes take.
_PAIR_BYTES = 12

logger = logging.getLogger("fastblt.api")

Schema = TypeVar("Schema", bound=BaseModel)

_logged: set[str] = set()


class _Large(msgspec.Struct):
    """The fields that may be large. The decoder skips all others."""

    prompt: msgspec.Raw = msgspec.Raw(b"0")
    tokens: msgspec.Raw = msgspec.Raw(b"0")


_large = msgspec.json.Decoder(_Large)
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
#: Cuts an array into at most MAX_CHOICES raw items.
_items = msgspec.json.Decoder(
    msgspec.defstruct(
        "_Items",
        [(f"item{i}", msgspec.Raw, msgspec.Raw()) for i in range(MAX_CHOICES)],
        array_like=True,
        forbid_unknown_fields=True,
    )
)
_ids = msgspec.json.Decoder(list[int | float])


def max_body_bytes(max_model_len: int, prompts: int = MAX_CHOICES) -> int:
    """The size limit of a body with up to `prompts` prompts: their ids as clients write them, and the other fields."""
    return MAX_FIELDS_BYTES + _ID_BYTES * min(MAX_PROMPT_IDS, prompts * max_model_len)


def parse_body(body: bytes | bytearray, schema: type[Schema], large: str, max_length: int) -> tuple[Schema, list[str]]:
    """The object, and the names of fields that `schema` does not have.

    `large` names the required field that may be large: a text, a list of ids, or a list of these, each of about
    `max_length` ids at most.

    Raises ApiError (400) unless `body` is JSON, in UTF-8, with fields of the right types; InvalidRequestError for a
    text or a list of ids that is too long.
    """
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as error:
        refuse(f"the body is not valid UTF-8 at byte {error.start}")
    try:
        if len(body) > MAX_FIELDS_BYTES:
            found = getattr(_large.decode(body), large)
            if len(body) - len(memoryview(found)) > MAX_FIELDS_BYTES:
                refuse(f"the body has more than {MAX_FIELDS_BYTES} bytes beside the {large}")
        fields = _fields.decode(body)
        data = {
            name: _large_value(field, large, max_length) if name == large else _small_value(field, name)
            for name, field in fields.items()
            if name in schema.model_fields
        }
    except msgspec.ValidationError:
        refuse("the body must be a JSON object")
    except RecursionError:
        refuse("the body is nested too deeply")
    except msgspec.DecodeError as error:
        # It takes half of a surrogate pair for a body that ends too early.
        if (half := _half_a_pair(body)) is not None:
            refuse(half)
        refuse(f"the body is not valid JSON: {error}")
    if data.get(large) is None:
        refuse(f"{large} is required", large)
    unknown = [name for name, field in fields.items() if name not in data and bytes(field) != b"null"]
    refused: dict[str, str] = getattr(schema, "REFUSED", {})
    for name in unknown:
        if name in refused:
            refuse(f"{name} is not a field of this server; {refused[name]}", name)
    return _validate(schema, without_nulls(data)), _ignored(unknown)


def without_nulls(data: dict[str, Any]) -> dict[str, Any]:
    """`data` without null values: clients send null for a field that they leave at its default."""
    return {key: value for key, value in data.items() if value is not None}


def refuse(message: str, param: str | None = None) -> NoReturn:
    raise ApiError(400, message, code="invalid_body", param=param)


def _small_value(raw: msgspec.Raw, name: str) -> Any:
    data = bytes(raw)
    if data.count(b"[") + data.count(b"{") > _MAX_LISTS:
        refuse(f"{name} has more than {_MAX_LISTS} lists and objects", name)
    return _parse_json(data)


def _large_value(raw: msgspec.Raw, name: str, max_length: int) -> Any:
    """Parses a text, a list of ids, or a list of these. Anything else is returned for the schema to refuse."""
    view = memoryview(raw)
    if view[:1] == b"[" and _second(view) in b'["':
        try:
            items = _items.decode(raw)
        except msgspec.ValidationError:
            raise InvalidRequestError(f"{name} has more than {MAX_CHOICES} items", name) from None
        return [_one(item, name, max_length) for item in msgspec.structs.astuple(items) if len(memoryview(item))]
    return _one(raw, name, max_length)


def _second(view: memoryview) -> bytes:
    """The first character after an array's bracket and white space."""
    return bytes(view[1:64]).lstrip()[:1] or b" "


def _one(raw: msgspec.Raw, name: str, max_length: int) -> Any:
    """Parses a text or a list of ids. Raises InvalidRequestError, without parsing, if it is too long."""
    size, first = len(memoryview(raw)), bytes(memoryview(raw)[:1])
    if first == b'"':
        if size > _ID_BYTES * (max_length + 1):
            raise InvalidRequestError(f"{name} has {size} bytes; {max_length} ids are allowed at most", name)
        return _parse_json(raw)
    data = bytes(raw)
    if data == b"null":
        return None
    # Lists of ids have no other commas.
    if (count := data.count(b",") + 1) > max_length + 1:
        raise InvalidRequestError(f"{name} has {count} ids; {max_length} are allowed at most", name)
    try:
        ids = _ids.decode(data)
    except msgspec.ValidationError:
        raise InvalidRequestError(f"{name} must be a text or a list of byte ids", name) from None
    return [_whole(i) if type(i) is float else i for i in ids]


def _parse_json(raw: msgspec.Raw | bytes) -> Any:
    def refuse_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a JSON number")

    text = str(raw, "utf-8")
    try:
        data = json.loads(text, parse_constant=refuse_constant, parse_float=_number)
        if "\\ud" in text or "\\uD" in text:
            # Half of a surrogate pair cannot be encoded as UTF-8, and would fail wherever it is written out.
            json.dumps(data, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        refuse(_half_a_pair(text.encode()) or "the body has half of a surrogate pair")
    except ValueError as error:
        refuse(f"the body is not valid JSON: {error}")
    return data


def _half_a_pair(body: bytes | bytearray) -> str | None:
    """What to say about half of a surrogate pair (RFC 8259, section 8.2) in a JSON text; None if there is none."""
    for start in range(0, len(body), _PIECE_BYTES):
        # With what stands before and after it, that may be the other half.
        first = max(start - _PAIR_BYTES, 0)
        piece = bytes(body[first : start + _PIECE_BYTES + _PAIR_BYTES])
        for half in _HALF.finditer(piece):
            run = half.start()
            while run and piece[run - 1] == ord("\\"):
                run -= 1
            escaped = (half.start() - run) % 2
            at = first + half.start()
            if start <= at < start + _PIECE_BYTES and not escaped:
                return (
                    f"the body has {half[0].decode()} at byte {at}: half of a surrogate pair, which is no character; "
                    "send both halves, or the character itself (bytes that are no text may be sent as ids)"
                )
    return None


def _number(text: str) -> int | float:
    """JSON has one kind of number: 5.0 is the integer 5."""
    return _whole(float(text))


def _whole(value: float) -> int | float:
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _validate(schema: type[Schema], data: dict[str, Any]) -> Schema:
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        # pydantic adds names of union members and validators to the path. The client does not know them.
        path = [str(part) for part in first["loc"]]
        param = ".".join(path[:2] if path[:1] in (["decoding"], ["stream_options"]) else path[:1])
        refuse(_in_words(param[:64], path[-1][:64], dict(first), schema), param[:64] or None)


#: What a value must be, by pydantic's word for what is wrong with it.
_MUST_BE = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "float_type": "a number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "list_type": "a list",
    "model_type": "an object",
    "string_type": "a string",
}


def _in_words(param: str, name: str, error: dict[str, Any], schema: type[BaseModel]) -> str:
    """What is wrong with a field, in words that do not presume to know this program."""
    context = error.get("ctx") or {}
    match error["type"]:
        case "extra_forbidden":
            holder = param.partition(".")[0]
            known = getattr(schema.model_fields[holder].annotation, "model_fields", None)
            fields = f"; its fields are {', '.join(known)}" if known else ""
            return f"{holder} has no field {name}{fields}"
        case "enum" | "literal_error":
            return f"{param} must be {context.get('expected')}"
        case "greater_than_equal" | "less_than_equal":
            return f"{param} is out of range"
        case "value_error":
            return f"{param} {error['msg'].removeprefix('Value error, ')}"
        case kind if kind in _MUST_BE:
            return f"{param} must be {_MUST_BE[kind]}"
    return f"{param}: {error['msg']}"


def _ignored(unknown: list[str]) -> list[str]:
    """The names of unknown fields, in ASCII and bounded in number and length. Each name is logged once."""
    names = [key[:_MAX_NAME].encode("ascii", "backslashreplace").decode() for key in unknown[:_MAX_IGNORED]]
    # Only characters that are safe in a header's value and in a log line.
    names = ["".join(c if "!" <= c <= "~" and c != "," else "?" for c in name) or "?" for name in names]
    if fresh := set(names) - _logged:
        if len(_logged) < _MAX_LOGGED:
            logger.warning("requests have fields that mean nothing here: %s", ", ".join(sorted(fresh)))
        _logged.update(list(fresh)[: _MAX_LOGGED - len(_logged)])
    return names
