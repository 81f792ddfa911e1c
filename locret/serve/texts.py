"""The text of an answer, token by token: whole characters, up to a stop string."""

from collections.abc import Sequence
from typing import Any

UNKNOWN = "�"
"""What a decoder writes for bytes that are no character, or not yet a whole one."""
LONGEST = 4  # bytes of a character, each of which may be a token
MOST_WAITING = 64  # tokens that may wait for a whole character: more are no text


class TextOf:
    """Decodes tokens as they come.

    Args:
        tokenizer: decodes; special tokens are left out.
        stop: strings that end the text, and are no part of it.

    Attributes:
        stopped: a stop string was met: there is no more text.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._decoded = 0  # characters of these tokens that were decoded before
        self._known = 0  # tokens that end with a whole character, before those that wait
        self._waiting = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain now, beyond what was returned before."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        unsure = min(len(text) - len(text.rstrip(UNKNOWN)), LONGEST)
        if len(self._tokens) - self._known > MOST_WAITING:
            unsure = 0
        certain = len(text) - unsure
        new, self._decoded = text[self._decoded : certain], max(self._decoded, certain)
        if not unsure:
            # The tokens before stay, because some decoders write a first token in another way.
            del self._tokens[: self._known]
            self._known = len(self._tokens)
            self._decoded = len(self._decode(self._tokens))
        return self._before_stop(new)

    def end(self) -> str:
        """What is left, once there are no more tokens."""
        rest = self._decode(self._tokens)[self._decoded :]
        text = self._before_stop(rest)
        if self.stopped:
            return text
        text, self._waiting = text + self._waiting, ""
        return text

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _before_stop(self, new: str) -> str:
        """The text that no stop string can have begun in, with what waited for `new`."""
        if self.stopped:
            return ""
        text = self._waiting + new
        places = [place for place in map(text.find, self._stop) if place >= 0]
        if places:
            self.stopped, self._waiting = True, ""
            return text[: min(places)]
        begun = max((_begun(text, stop) for stop in self._stop), default=0)
        self._waiting = text[len(text) - begun :]
        return text[: len(text) - begun]


def _begun(text: str, stop: str) -> int:
    """Characters of `stop` that the text ends with, fewer than all."""
    most = min(len(stop) - 1, len(text))
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
