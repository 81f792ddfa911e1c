"""KVzip (arXiv 2505.23416): what the model looks at while it repeats the context."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from locret.heads.targets import AnswerView, log_max_prob
from locret.policies.base import LayerChunk, Policy, highest_of_all, raised
from locret.quantities import check_whole

REPEAT = "\n\nRepeat the previous context exactly."
REPEAT_AFTER = "\n\nRepeat the previous context, starting after:"

_MARK = "here the context stands"


class Wording(NamedTuple):
    """Tokens around a copy, as trainings by replay have them. All empty: the copy follows the
    context at once.

    Attributes:
        opening: what stands before the user's text; it is not repeated, if all rows begin so.
        whole: asks for the copy.
        after: asks for what comes after tokens that follow.
        end: the end of the user's turn and the beginning of the model's.
    """

    opening: tuple[int, ...] = ()
    whole: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    end: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any, chat: bool = True) -> "Wording":
        """That of a tokenizer, in its chat template if it has one and `chat` says so; the context
        stands in a user's turn then, which the copy is asked for in."""

        def ids(text: str) -> tuple[int, ...]:
            return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

        opening, ending = tuple(tokenizer("")["input_ids"]), "\n\n"
        if chat and tokenizer.chat_template:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
            )
            before, _, ending = text.partition(_MARK)
            opening = ids(before)
        return cls(opening, ids(REPEAT + ending), ids(REPEAT_AFTER), ids(ending))


NO_WORDS = Wording()


class KVzipPolicy(Policy):
    """score(k) = log(p + 1e-5), p the largest attention probability that k gets from any token of a
    copy of the context and any query head of its group (sections 3.2 and 3.3).

    The whole context is read first. Then the model is asked for the context and reads it again,
    `piece` tokens at a time, each piece after the whole context and by itself; of this nothing is
    kept. One eviction follows. What trained heads only predict is known here, so that this is their
    oracle.

    Cost: a second reading, whose attention is computed twice; and memory for the whole context.

    Args:
        wording: how the copy is asked for; an engine has no tokenizer to know (`Wording.of`).
        piece: tokens of the context that are repeated at a time; published 2,000.
        lead: the tokens before a piece that its request ends with; published 8.
        dynamic: the highest scores of all layers and heads stay, whichever head they are in, at
            least one in each (section 3.4, "non-uniform"); False: as budgets and quotas say.
    """

    name = "kvzip"
    rereads = True

    def __init__(
        self, wording: Wording = NO_WORDS, piece: int = 2048, lead: int = 8, dynamic: bool = False
    ) -> None:
        check_whole("piece", piece, 1)
        check_whole("lead", lead, 0)
        if not isinstance(dynamic, bool):
            raise ValueError(f"dynamic is {dynamic!r}; expected True or False")
        self.wording = wording
        self.piece = piece
        self.lead = lead
        self.dynamic = dynamic

    @classmethod
    def words(cls, tokenizer: Any, chat: bool = True) -> dict[str, Any]:
        return {"wording": Wording.of(tokenizer, chat)}

    def score(self, chunk: LayerChunk) -> Tensor:
        raise ValueError(
            "policy 'kvzip' scores a context by reading it again as a whole, and cannot score a "
            "chunk by itself; choose another policy here"
        )

    def second_readings(self, context: Tensor) -> Iterator[tuple[Tensor, int]]:
        opening, whole, after, end = (
            context.new_tensor(ids).expand(len(context), -1) for ids in self.wording
        )
        first = opening.shape[1]
        if context.shape[1] <= first or not torch.equal(context[:, :first], opening):
            first = 0
        for start in range(first, context.shape[1], self.piece):
            lead = context[:, max(start - self.lead, first) : start]
            asked = [whole] if start == first else [after, lead, end]
            piece = context[:, start : start + self.piece]
            yield torch.cat([*asked, piece], dim=1), piece.shape[1]

    def look(self, view: AnswerView) -> Tensor:
        return log_max_prob(view)

    @property
    def shares(self) -> bool:
        return self.dynamic

    def allot(self, scores: list[Tensor], budgets: list[int]) -> list[Tensor] | None:
        if not self.dynamic:
            return None
        # Nothing attends to a head that holds nothing.
        safe = [
            raised(layer, layer.new_ones(layer.shape[:2], dtype=torch.long)) for layer in scores
        ]
        total = safe[0].new_full(safe[0].shape[:1], safe[0].shape[1] * sum(budgets)).long()
        return [chosen.sum(dim=-1) for chosen in highest_of_all(safe, total)]
