"""What comes in: bodies of requests, read within a limit and checked before anything looks into
them; the fields that this server knows, OpenAI's names, types and bounds; the prompts they make.

Fields that nobody knows are ignored, as OpenAI-compatible servers do. Those that OpenAI knows and
this server cannot obey are refused where they ask for something.
"""

import json
import re
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any, Literal, TypeVar

from anyio import to_thread
from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from locret.quantities import format_bytes
from locret.serve.replies import Refused, lower
from locret.serve.requests import Ask

# ---- bodies --------------------------------------------------------------------------------

MOST_DEPTH = 32
"""Lists and objects within one another. A request needs 5 of them."""
TOO_DEEP = f"the JSON is nested more than {MOST_DEPTH} levels deep"
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
        raise Refused(400, TOO_DEEP) from error
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
            raise Refused(400, TOO_DEEP)
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


def too_large(what: str, most: int) -> Refused:
    """The refusal of what has more than `most` bytes."""
    message = f"{what} larger than {format_bytes(most)}, the most that this server takes"
    return Refused(413, message, "body_too_large", {"Connection": "close"})


# ---- fields --------------------------------------------------------------------------------

MOST_STOPS = 4
LONGEST_STOP = 512  # characters
MOST_MESSAGES = 10_000
DEFAULT_TEMPERATURE = 1.0  # OpenAI's
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, of /v1/completions

Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
_INT64 = 2**63
_PLAIN = {"type": "text"}
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "response_format": (_PLAIN,),
    "modalities": (["text"],),
    "audio": (),
    "echo": (False,),
    "suffix": ("",),
}
"""Fields that this server cannot obey, and the values that ask for nothing."""


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class Message(BaseModel):
    """One message; its content is a string, or a list of parts that must all be text."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Any = None

    @property
    def text(self) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        if not isinstance(self.content, list):
            raise Refused(400, "content of a message is neither a string nor a list of text parts")
        return "".join(_text_of(part) for part in self.content)


def mappings(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as chat templates take them. Raises Refused: something in them is not text."""
    roles = {"developer": "system"}
    return [{"role": roles.get(m.role, m.role), "content": m.text} for m in messages]


class Sampling(BaseModel):
    """What both kinds of completions take."""

    model_config = ConfigDict(strict=True)

    model: str | None = None
    context: str | None = None
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    stop: list[Stop] | None = Field(None, max_length=MOST_STOPS)
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def _ask(self, prompt: list[int], shared: int, max_tokens: int | None) -> Ask:
        return Ask(
            prompt,
            context=self.context,
            shared=shared,
            max_tokens=max_tokens,
            temperature=DEFAULT_TEMPERATURE if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=tuple(self.stop or ()),
            ignore_eos=bool(self.ignore_eos),
        )


class ChatFields(Sampling):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)

    def ask(self, prompts: "Prompts") -> Ask:
        """What the service is asked. Raises Refused: something in it is not text, or is refused by
        the model's template."""
        messages = mappings(self.messages)
        follows = self.context is not None
        ids, shared = (prompts.question(messages), 0) if follows else prompts.chat(messages)
        return self._ask(ids, shared, self.max_completion_tokens or self.max_tokens)


class CompletionFields(Sampling):
    """`POST /v1/completions`: a text, a list with one text, or token ids."""

    prompt: Any

    def ask(self, prompts: "Prompts") -> Ask:
        """What the service is asked. Raises Refused: it has not one prompt of known tokens."""
        ids = prompts.completion(self._one, follows=self.context is not None)
        return self._ask(ids, 0, self.max_tokens or DEFAULT_COMPLETION_TOKENS)

    @property
    def _one(self) -> str | list[int]:
        """The only prompt."""
        prompt = self.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
            if len(prompt) > 1:
                raise Refused(400, f"prompt has {len(prompt)} prompts; send one request for each")
            prompt = prompt[0]
        if isinstance(prompt, str) and prompt:
            return prompt
        if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
            return prompt
        raise Refused(400, "prompt is not a text or a list of token ids, or there is nothing in it")


class ContextFields(BaseModel):
    """`POST /v1/contexts`: either of the two."""

    model_config = ConfigDict(strict=True)

    text: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=MOST_MESSAGES)


Fields = TypeVar("Fields", bound=BaseModel)


def fields_of(kind: type[Fields], found: dict[str, Any]) -> Fields:
    """The fields in a JSON object. Raises Refused: one has the wrong type, is out of bounds, or
    asks for what cannot be had."""
    for name, harmless in _UNSUPPORTED.items():
        value = found.get(name)
        # 0 is equal to False, but of `logprobs` it asks for some.
        asks = not any(value == one and type(value) is type(one) for one in harmless)
        if value is not None and asks:
            raise Refused(400, f"{name} is not supported; leave it out", "unsupported")
    try:
        return kind.model_validate(_with_generation_config(found))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(step) for step in first["loc"]) or "the body"
        raise Refused(400, f"{place[:80]}: {lower(first['msg'])}") from error


def _with_generation_config(found: dict[str, Any]) -> dict[str, Any]:
    """With what `transformers chat` says in `generation_config`, JSON in a string."""
    text = found.get("generation_config")
    if not isinstance(text, str):
        return found
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        raise Refused(400, "generation_config is not JSON; leave it out") from None
    if not isinstance(config, dict):
        return found
    given = {
        "max_tokens": config.get("max_new_tokens"),
        "temperature": config.get("temperature") if config.get("do_sample") else 0.0,
        "top_p": config.get("top_p"),
    }
    both = (given, found)  # what the request itself says wins
    return {name: value for each in both for name, value in each.items() if value is not None}


def _text_of(part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise Refused(400, "content of a message has a part that is not text; only text is read")


# ---- prompts --------------------------------------------------------------------------------
#
# A context is read up to the end of the user's last text, and the turn stays open. A question goes
# on in that turn: a blank line, the question, the end of the turn and the start of the answer. So
# both together are what one prompt with the text and the question would be.

PLACE = "<<locret: the text>>"
"""Stands for the text of a context while the template is filled in."""
BETWEEN = "\n\n"
"""Between the text of a context and the question."""

Messages = Sequence[dict[str, str]]


class Prompts:
    """Makes token ids for one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = len(tokenizer)

    def chat(self, messages: Messages) -> tuple[list[int], int]:
        """The prompt of a conversation, and how many of its first tokens are all messages but the
        last. Raises Refused: no chat template, or one that refuses the messages."""
        text = self._filled(messages, answer=True)
        earlier = self._shared_text(messages, text)
        if not earlier or not self.tokenizer.is_fast:
            return self._ids(text), 0
        encoded = self.tokenizer(
            text, add_special_tokens=False, verbose=False, return_offsets_mapping=True
        )
        ends = (end for _, end in encoded["offset_mapping"])
        ids = list(encoded["input_ids"])
        shared = next((i for i, end in enumerate(ends) if end > len(earlier)), len(ids))
        return ids, min(shared, len(ids) - 1)

    def completion(self, prompt: str | list[int], follows: bool = False) -> list[int]:
        """The ids of a plain prompt, special tokens as the tokenizer adds them.

        Args:
            prompt: a text, or ids.
            follows: it follows a context, so that nothing is added.

        Raises:
            Refused: ids that the tokenizer does not have, or no tokens.
        """
        ids = self._ids(prompt, special=not follows) if isinstance(prompt, str) else prompt
        if not ids:
            raise Refused(400, "the prompt has no tokens; send some text")
        if not all(0 <= token < self.vocabulary for token in ids):
            raise Refused(400, f"a token id of the prompt is not in 0 to {self.vocabulary - 1}")
        return ids

    def context(self, messages: Messages) -> list[int]:
        """What is read of a context: up to the end of the last text, which must be the user's.
        Raises Refused: no text, the last message is not the user's, or as `chat`."""
        *earlier, last = messages
        text = last["content"].strip()
        if not text:
            raise Refused(400, "the context has no text; send some")
        if last["role"] != "user":
            raise Refused(
                400, f"the last message of a context is the {last['role']}'s; expected the user's"
            )
        if not self.tokenizer.chat_template:
            return self._ids(text, special=True)
        standing = {"role": "user", "content": PLACE}
        before, _, _ = self._filled([*earlier, standing], answer=True).rpartition(PLACE)
        return self._ids(before + text)

    def question(self, messages: Messages) -> list[int]:
        """What is asked about a context; later messages follow as further turns. Raises Refused:
        the first message is not the user's, or as `chat`."""
        first, *later = messages
        if first["role"] != "user":
            raise Refused(
                400,
                f"the first message about a context is the {first['role']}'s; expected the user's "
                "(system messages belong in the context itself)",
            )
        standing = first | {"content": PLACE + BETWEEN + first["content"].strip()}
        _, _, behind = self._filled([standing, *later], answer=True).partition(PLACE)
        return self._ids(behind)

    def _shared_text(self, messages: Messages, text: str) -> str:
        """How the prompt begins that other last messages would have too."""
        if len(messages) < 2:
            return ""
        try:
            earlier = self._filled(messages[:-1], answer=False)
        except Refused:  # of templates that want a user's message last
            return ""
        return earlier if text.startswith(earlier) else ""

    def _filled(self, messages: Messages, answer: bool) -> str:
        from jinja2.exceptions import TemplateError

        if not self.tokenizer.chat_template:
            raise Refused(400, "this model has no chat template; use /v1/completions")
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=answer
            )
        except TemplateError as error:
            reason = " ".join(str(error).split())[:200]
            raise Refused(
                400, f"the model's chat template refuses the messages: {reason}"
            ) from error
        return str(text)

    def _ids(self, text: str, special: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
