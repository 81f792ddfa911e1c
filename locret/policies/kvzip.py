"""KVzip (arXiv 2505.23416): what the model looks at while it repeats the context."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from locret.heads.targets import AnswerView, max_prob
from locret.policies.base import LayerChunk, Policy
from locret.policies.sharing import highest_of_all, raised
from locret.quantities import check_whole

REQUEST = "\n\nRepeat the previous context exactly."
NEAR_ZERO = 1e-5
"""Added to probabilities before their logarithm is taken, as it is to labels."""

_MARK = "here the context stands"


class KVzipPolicy(Policy):
    """score(k) = log(p + 1e-5), p the largest attention probability that k gets from any token of a
    copy of the context and any query head of its group (sections 3.2 and 3.3).

    The whole context is read first. Then the model reads `request` and the context again, `piece`
    tokens at a time, each piece after the whole context and by itself; of this nothing is kept. One
    eviction follows. What trained heads only predict is known here, so that this is their oracle.

    Cost: a second reading, whose attention is computed twice; and memory for the whole context.

    Args:
        request: tokens that ask for the copy (`words`); () = the copy follows at once.
        piece: tokens of the context that are repeated at a time; published 2,000.
        lead: so many tokens before a piece are repeated first, to lead into it; published 8.
        dynamic: the highest scores of all layers and heads stay, whichever head they are in, at
            least one in each (section 3.4, "non-uniform"); False: as budgets and quotas say.
    """

    name = "kvzip"
    rereads = True

    def __init__(
        self,
        request: Sequence[int] = (),
        piece: int = 2048,
        lead: int = 8,
        dynamic: bool = False,
    ) -> None:
        check_whole("piece", piece, 1)
        check_whole("lead", lead, 0)
        if not isinstance(dynamic, bool):
            raise ValueError(f"dynamic is {dynamic!r}; expected True or False")
        self.request = tuple(request)
        self.piece = piece
        self.lead = lead
        self.dynamic = dynamic

    @classmethod
    def words(cls, tokenizer: Any, chat: bool = True) -> dict[str, Any]:
        after = "\n\n"
        if chat and tokenizer.chat_template:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
            )
            after = text.partition(_MARK)[2]  # the user's turn ends and the model's begins
        return {"request": tokenizer(REQUEST + after, add_special_tokens=False)["input_ids"]}

    def score(self, chunk: LayerChunk) -> Tensor:
        raise ValueError(
            "policy 'kvzip' scores a context by reading it again as a whole, and cannot score a "
            "chunk by itself; choose another policy here"
        )

    def second_readings(self, context: Tensor) -> Iterator[tuple[Tensor, int]]:
        request = context.new_tensor(self.request).expand(len(context), -1)
        for start in range(0, context.shape[1], self.piece):
            lead = context[:, max(start - self.lead, 0) : start]
            piece = context[:, start : start + self.piece]
            yield torch.cat([request, lead, piece], dim=1), piece.shape[1]

    def look(self, view: AnswerView) -> Tensor:
        return (max_prob(view) + NEAR_ZERO).log()

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
