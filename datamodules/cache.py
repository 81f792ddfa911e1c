"""Samples kept on disk, so that a conversation is tokenised once for all epochs, workers and runs.

One file a sample, named by a hash of all that the sample follows from: the tokenizer, the encoder's
settings and the messages. Single files need no lock: they are written aside and renamed, which is
atomic on network file systems too, where several nodes share a folder and a database would not do;
and a file that is broken spoils itself only. Files are of a few tens of KB, in 256 folders.
"""

import hashlib
import json
import os
import sys
import uuid
import warnings
from datetime import date
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from transformers import PreTrainedTokenizerBase

from datamodules.conversations import Conversation
from datamodules.encoder import ConversationEncoder, Sample

_FORMAT = 2  # raise it with every change of what a sample is or how a file is written
_SPANS = ("answers", "branches")
_NUMBERS = ("cut", "answers_cut", "answers_unmatched", "answers_removed")


class CachedEncoder:
    """Encodes a conversation, or reads what it was encoded to before. The result is the same.

    A file that cannot be read or does not fit its checksum is written anew. If files cannot be
    written (a full disk) a warning says so once, and the work goes on without them. Conversations
    that give no sample are not kept.

    Args:
        encoder: makes the samples that are not there yet.
        folder: where to keep them; made if missing. Delete it at any time.

    Raises:
        ValueError: if the folder cannot be made.
    """

    def __init__(self, encoder: ConversationEncoder, folder: str) -> None:
        self.encoder = encoder
        self.folder = Path(folder)
        self._settings = _digest([encoder_settings(encoder), tokenizer_facts(encoder.tokenizer)])
        self._failed = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cache_dir {folder!r} cannot be made: {error}") from error

    def __call__(self, conversation: Conversation) -> Sample:
        """The sample; see `ConversationEncoder.__call__`.

        Raises:
            SkippedRow: as the encoder does.
        """
        path = self.path(conversation)
        sample = _read(path, conversation)
        if sample is None:
            sample = self.encoder(conversation)
            self._write(path, sample)
        return sample

    def path(self, conversation: Conversation) -> Path:
        """The file of a conversation, whether it is there or not."""
        content: list[Any] = [[m["role"], m["content"]] for m in conversation.messages]
        if conversation.tools or any(len(m) > 2 for m in conversation.messages):
            content = [conversation.messages, conversation.tools]
        if conversation.context:
            content = [content, conversation.context, conversation.questions]
        name = _digest([self._settings, content])
        return self.folder / name[:2] / name[2:]

    def _write(self, path: Path, sample: Sample) -> None:
        try:
            path.parent.mkdir(exist_ok=True)
            # Not by tempfile: its files are their owner's alone, and others share the folder.
            aside = path.parent / f".new-{uuid.uuid4().hex}"
            try:
                with aside.open("xb") as file:
                    file.write(_to_bytes(sample))
                os.replace(aside, path)
            except BaseException:
                aside.unlink(missing_ok=True)
                raise
        except OSError as error:
            if not self._failed:
                warnings.warn(f"the sample cache cannot be written: {error}", stacklevel=2)
            self._failed = True


def encoder_settings(encoder: ConversationEncoder) -> list[Any]:
    """What a sample and its file depend on beside tokenizer and messages."""
    return [_FORMAT, sys.byteorder, *encoder.settings]


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """What the tokens of a text depend on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    template = str(tokenizer.chat_template)
    return [
        type(tokenizer).__name__,
        backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()),
        repr(sorted(getattr(tokenizer, "init_kwargs", {}).items(), key=lambda pair: pair[0])),
        sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()),
        template,
        transformers.__version__,
        tokenizers.__version__,
        # Some templates (Llama 3.2) write today's date into the prompt.
        str(date.today()) if "strftime_now" in template else "",
    ]


def _digest(content: Any) -> str:
    # ASCII escapes, so that a text with half a surrogate pair has a hash as well.
    return hashlib.sha256(json.dumps(content).encode("ascii")).hexdigest()


def _to_bytes(sample: Sample) -> bytes:
    """A checksum, a line of JSON, then the tokens as int32."""
    payload = sample.input_ids.int().numpy().tobytes()
    record = {name: getattr(sample, name) for name in (*_SPANS, *_NUMBERS)}
    body = json.dumps(record).encode() + b"\n" + payload
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def _read(path: Path, conversation: Conversation) -> Sample | None:
    try:
        checksum, _, body = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    if hashlib.sha256(body).hexdigest().encode() != checksum:
        return None
    line, _, payload = body.partition(b"\n")
    record = json.loads(line)
    return Sample(
        input_ids=torch.frombuffer(bytearray(payload), dtype=torch.int32).long(),  # type: ignore[arg-type]
        source=conversation.source,
        id=conversation.id,
        **{name: tuple(map(tuple, record[name])) for name in _SPANS},  # type: ignore[arg-type]
        **{name: record[name] for name in _NUMBERS},
    )
