"""A service without a model, which says the words that it is told to say."""

from dataclasses import dataclass, field

from locret.serve.requests import (
    Answer,
    Cancelled,
    ContextInfo,
    Counters,
    End,
    Piece,
    Reading,
    UnknownContext,
    Usage,
)

USAGE = Usage(prompt_tokens=7, cached_tokens=3, completion_tokens=2, units=5, bytes=99)
ID = "abcdefghijklmnopqrstuv"


@dataclass
class FakeContexts:
    stored: dict = field(default_factory=dict)

    def list(self):
        return list(self.stored.values())

    def info(self, id):
        if id not in self.stored:
            raise UnknownContext("there is no such context; read it again with POST /v1/contexts")
        return self.stored[id]

    def delete(self, id):
        self.info(id)
        del self.stored[id]


@dataclass
class FakeService:
    """
    Attributes:
        said: the pieces of every answer.
        ends: whether answers end by themselves.
        error: what `ask` raises.
        fails: what an answer ends with after its pieces.
    """

    said: tuple = ("It ", "is.")
    ends: bool = True
    error: Exception | None = None
    fails: Exception | None = None
    ready: bool = True
    asked: list = field(default_factory=list)
    read_ids: list = field(default_factory=list)
    pending: list = field(default_factory=list)
    contexts: FakeContexts = field(default_factory=FakeContexts)

    def start(self):
        self.closed = False

    def close(self, drain=True, seconds=60.0):
        self.closed = True
        if not drain:
            for pending in self.pending:
                pending.cancel()

    @property
    def cancelled(self):
        """Whether the last request was."""
        return isinstance(self.pending[-1].outcome[1], Cancelled)

    @property
    def counts(self):
        return Counters(queued=1, answered=1, units=1)

    def ask(self, ask):
        if self.error is not None:
            raise self.error
        self.asked.append(ask)
        answer = Answer()
        self.pending.append(answer)
        for text in self.said:
            answer.put(Piece(text))
        if self.fails is not None:
            answer.close(self.fails)
        elif self.ends:
            answer.put(End("stop", USAGE), last=True)
        return answer

    def read(self, ids):
        self.read_ids.append(ids)
        reading = Reading()
        self.pending.append(reading)
        if self.fails is not None:
            reading.close(self.fails)
        elif self.ends:
            info = ContextInfo(ID, len(ids), 4, 100)
            self.contexts.stored[ID] = info
            reading.put(info, last=True)
        return reading
