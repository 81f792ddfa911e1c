"""Bodies of requests: read within a limit, decoded, and checked before anything looks into them;
and the API key that comes with them.
"""

import hmac
import json
import re
from collections.abc import AsyncGenerator
from typing import Any

from anyio import to_thread
from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from locret.quantities import format_bytes
from locret.serve.errors import Refused

MOST_DEPTH = 32
"""Lists and objects within one another. A request needs 5 of them."""
_SURROGATE = re.compile("[\ud800-\udfff]")


async def read_json(request: Request, most: int) -> dict[str, Any]:
    """The JSON object in the body of a request. Raises Refused: the body has more than `most` bytes
    (413), is not called JSON (415), or is not a JSON object of Unicode text (400)."""
    # Web pages may send other types to a server on this machine without being asked for leave.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"the body is {kind[:80] or 'of no type'!r}; send Content-Type: application/json"
        raise Refused(415, message, headers={"Connection": "close"})
    body = b"".join([chunk async for chunk in chunks(request, most)])
    return await to_thread.run_sync(parse, body)


async def read_upload(request: Request, most: int) -> str:
    """The text of the only file in a multipart body, in UTF-8. Raises Refused: as `read_json`; no
    file, or several."""
    parser = MultiPartParser(
        request.headers, chunks(request, most), max_files=1, max_fields=8, max_part_size=1024
    )
    try:
        form = await parser.parse()
    except (MultiPartException, UnicodeError) as error:  # the codec is the one `charset=` names
        reason = getattr(error, "message", "its names are not in its charset")
        raise Refused(400, f"the multipart body cannot be read: {reason}") from error
    try:
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        if not files:
            raise Refused(
                400, "the multipart body has no file; send one, such as -F file=@book.txt"
            )
        content = await files[0].read()
    finally:
        await form.close()
    return await to_thread.run_sync(file_text, content)


async def chunks(request: Request, most: int) -> AsyncGenerator[bytes, None]:
    """The body of a request as it comes; refused at once where its length is told and too much."""
    told = request.headers.get("content-length", "")
    if told.isdecimal() and (len(told) > 18 or int(told) > most):
        raise too_large("the body is", most)
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > most:
            raise too_large("the body is", most)
        yield chunk


def parse(body: bytes) -> dict[str, Any]:
    """A JSON object of its bytes; errors as for `read_json`."""
    try:
        found = json.loads(_decoded(body, "the body"), parse_constant=_refuse_constant)
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:  # its text may repeat what was received, so only the place is told
        place = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise Refused(400, f"the body is not JSON{place}; expected a JSON object") from error
    if not isinstance(found, dict):
        raise Refused(400, "the body is JSON but not an object; expected {...}")
    _check_values(found)
    return found


def check_text(text: str) -> None:
    """Raises Refused: text that no tokenizer should see: null characters, halves of surrogate
    pairs."""
    if "\0" in text:
        raise Refused(400, "the text has null characters; take them out")
    if _SURROGATE.search(text):
        raise Refused(400, "the text has halves of surrogate pairs, which are not Unicode text")


def _check_values(found: Any) -> None:
    """Depth and strings of everything inside, keys included."""
    level, depth = [found], 0
    while level:
        depth += 1
        if depth > MOST_DEPTH:
            raise _too_deep()
        below: list[Any] = []
        for each in level:
            if isinstance(each, str):
                check_text(each)
            elif isinstance(each, dict):
                below += each.keys()
                below += each.values()
            elif isinstance(each, list):
                below += each
        level = below


def file_text(content: bytes) -> str:
    """The text of a file, with line ends as in Python; errors as for `read_upload`."""
    text = _decoded(content, "the file").removeprefix("\ufeff")
    check_text(text)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _decoded(content: bytes, what: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused(400, f"{what} is not UTF-8 text: byte {error.start} is wrong") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _too_deep() -> Refused:
    return Refused(400, f"the JSON is nested more than {MOST_DEPTH} levels deep")


def too_large(what: str, most: int) -> Refused:
    """The refusal of what has more than `most` bytes."""
    message = f"{what} larger than {format_bytes(most)}, the most that this server takes"
    return Refused(413, message, "body_too_large", {"Connection": "close"})


def check_key(request: Request, api_key: str | None) -> None:
    """Raises Refused: the request does not come with the key; None = it needs none."""
    if api_key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not is_key(given, api_key):
        message = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
        challenge = {"WWW-Authenticate": "Bearer"}
        raise Refused(401, message, "invalid_api_key", challenge)


def is_key(given: str, api_key: str) -> bool:
    """Whether somebody gave the key; takes as long whatever is given."""
    return hmac.compare_digest(given.strip().encode(), api_key.encode())
