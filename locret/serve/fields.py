"""The fields of a request that this server knows: OpenAI's names, types and bounds.

Fields that nobody knows are ignored, as OpenAI-compatible servers do. Those that OpenAI knows and
this server cannot obey are refused where they ask for something.
"""

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from locret.serve.errors import Refused, lower

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

    def as_mapping(self) -> dict[str, str]:
        """As chat templates take it."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.text}


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

    def settings(self, default_tokens: int | None = None) -> dict[str, Any]:
        """The settings of an `Ask`."""
        temperature = DEFAULT_TEMPERATURE if self.temperature is None else self.temperature
        return {
            "context": self.context,
            "max_tokens": default_tokens if self.max_tokens is None else self.max_tokens,
            "temperature": temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "seed": self.seed,
            "stop": tuple(self.stop or ()),
            "ignore_eos": bool(self.ignore_eos),
        }


class ChatFields(Sampling):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)

    def settings(self, default_tokens: int | None = None) -> dict[str, Any]:
        newer = self.max_completion_tokens
        return super().settings(default_tokens) | ({} if newer is None else {"max_tokens": newer})


class CompletionFields(Sampling):
    """`POST /v1/completions`: a text, a list with one text, or token ids."""

    prompt: Any

    @property
    def one(self) -> str | list[int]:
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
