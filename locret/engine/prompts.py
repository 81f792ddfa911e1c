"""Prompts, contexts and questions as users give them: which tokens are read, and in what order.

A prompt's last tokens are left for the call that answers; query-aware heads read some of them in
front of it. Rows of different lengths are read each as it would be alone (`locret.engine.reading`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from locret.cache.cache import RetainedCache
from locret.cache.files import check_model, describe
from locret.engine.arguments import check_ids, unpadded
from locret.engine.config import EngineConfig
from locret.engine.reading import Reader


@dataclass(frozen=True)
class Prompts:
    """Reads what users give, through an attached backbone."""

    reader: Reader

    @property
    def config(self) -> EngineConfig:
        """The engine's settings."""
        return self.reader.config

    def read_context(
        self, input_ids: Tensor, padding: list[int], query_ids: Tensor | None
    ) -> RetainedCache:
        """The cache of whole contexts [B, n], for a query [B, q] if one is given."""
        rows = unpadded(input_ids, padding)
        lengths = [row.shape[1] for row in rows]
        if len(set(lengths)) == 1:
            return self.reader.read(torch.cat(rows), lengths[0], query_ids)
        queries = [None] * len(rows) if query_ids is None else query_ids.split(1)
        return self.reader.read_rows(rows, lengths, queries, input_ids.shape[1])

    @property
    def unread(self) -> int:
        """Last tokens of a prompt that are read after the final eviction."""
        return 1 if self.config.reading.query_aware else self.config.reading.local_tokens

    def read_prompt(self, input_ids: Tensor, padding: list[int]) -> RetainedCache:
        """The cache after all of the prompt but its local tokens, or the last one of them."""
        width = input_ids.shape[1]
        unread = min(self.unread, width)
        if not any(padding):
            context = input_ids[:, : width - unread]
            return self.reader.read(context, width, self._query_of(input_ids, context))
        rows = unpadded(input_ids, padding)
        contexts = [row[:, : max(row.shape[1] - unread, 0)] for row in rows]
        queries = [self._query_of(row, c) for row, c in zip(rows, contexts, strict=True)]
        in_front = {0 if query is None else query.shape[1] for query in queries}
        if self.config.reading.decode_interval and len(in_front) > 1:
            raise ValueError(
                "decode_interval: some rows are too short for query-aware heads to read a question "
                "in front, which is never evicted, and others are not; ask one row at a time"
            )
        lengths = [row.shape[1] for row in rows]
        cache = self.reader.read_rows(contexts, lengths, queries, width - unread)
        heads, device = self.reader.backbone.geometry.num_kv_heads, input_ids.device
        # Rows shorter than the local tokens are padded within these.
        within = [max(unread - length, 0) for length in lengths]
        if cache.padding is not None:
            cache.padding = tuple(map(sum, zip(cache.padding, within, strict=True)))
        for layer in cache.layers:
            layer.add_empty(within, heads, device)
        return cache

    @property
    def asks_together(self) -> bool:
        """Whether questions of different lengths about contexts can be asked together: all but
        their last tokens are read before, which is not the same to eviction and recall."""
        return self.config.reading.decode_interval is None and self.config.storage.recall is None

    def read_questions(self, cache: RetainedCache, questions: Tensor, padding: list[int]) -> Tensor:
        """Read questions of different lengths, all but their last tokens.

        Returns:
            [B, n] long: all that the cache knows then, padded on the left, and the last tokens.
        """
        one = questions.shape[1] - max(padding) + cache.unread_ids.shape[1] == 1
        if one or not self.asks_together or cache.recall is not None:
            what = "a question of one token" if one else "with decode_interval or recall, questions"
            raise ValueError(
                f"attention_mask holds zeros: {what} cannot be asked together with longer ones; "
                "ask rows of equal length, or one row at a time"
            )
        rows: dict[int, RetainedCache] = {}
        for skip in sorted(set(padding)):
            alike = [i for i, length in enumerate(padding) if length == skip]
            part = cache.rows(alike)
            assert part.token_ids is not None
            new = torch.cat([part.unread_ids.to(questions.device), questions[alike, skip:]], dim=1)
            self.reader.take_in(new[:, :-1], part)
            part.token_ids = torch.cat([part.token_ids, new[:, :-1].cpu()], dim=1)
            rows |= {i: part.rows([place]) for place, i in enumerate(alike)}
        stacked = self.reader.stacked([rows[i] for i in range(len(padding))], 0)
        cache.restore(stacked.snapshot())
        assert cache.token_ids is not None
        return torch.cat([cache.token_ids.to(questions.device), questions[:, -1:]], dim=1)

    def _query_of(self, prompt: Tensor, context: Tensor) -> Tensor | None:
        """What query-aware heads read in front of a prompt's context, if there is any."""
        tokens = self.config.recorded.query_tokens
        if tokens and self.config.reading.budget is not None and context.shape[1]:
            return prompt[:, -tokens:]
        return None

    def checked_query(self, query_ids: Tensor | None, input_ids: Tensor) -> Tensor | None:
        """The query to read in front of a context, or behind it, if any."""
        tokens, aware = self.config.recorded.query_tokens, self.config.reading.query_aware
        evicts = self.config.reading.budget is not None
        if query_ids is None:
            if aware and evicts:
                raise ValueError(
                    "the engine is query_aware, so that a context is compressed for a question: "
                    "pass query_ids, or leave query_aware out"
                )
            if tokens and evicts:
                raise ValueError(
                    f"these heads are query-aware (they learned with {tokens} tokens of the "
                    "question in front): pass query_ids, or use heads with query_tokens 0"
                )
            return None
        check_ids(query_ids)
        if not tokens and not aware:
            raise ValueError(
                "query_ids given, but the policy's heads are not query-aware, nor was the engine "
                "made with query_aware=True"
            )
        if query_ids.shape[0] != input_ids.shape[0]:
            raise ValueError(
                f"query_ids has {query_ids.shape[0]} rows and input_ids {input_ids.shape[0]}; they "
                "must match"
            )
        if not evicts or not self.reader.sizing.num_layers:
            return None
        # All of it behind the context, as much as the heads learned with in front.
        return query_ids[:, -tokens:].to(input_ids.device)

    def context_ids(self, cache: RetainedCache, input_ids: Tensor) -> Tensor:
        """Tokens that the cache has seen or was answered, for stock generate's bookkeeping."""
        layers, had = len(self.reader.backbone.layers), len(getattr(cache, "layers", ()))
        if not isinstance(cache, RetainedCache) or had != layers:
            raise ValueError(
                f"cache is a {type(cache).__name__} of {had} layers; expected one of "
                f"engine.prefill for this model, of {layers}"
            )
        ids = cache.token_ids
        if ids is None and not cache.seen:
            raise ValueError("the cache has read nothing yet; make one with engine.prefill")
        if ids is None or ids.shape[1] != cache.seen:
            known = 0 if ids is None else ids.shape[1]
            raise ValueError(
                f"the cache has seen {cache.seen} tokens but knows the ids of {known}: it was "
                "advanced outside the engine, or by beams; make a fresh one with engine.prefill"
            )
        if ids.shape[0] != input_ids.shape[0]:
            raise ValueError(
                f"the cache has {ids.shape[0]} rows and input_ids {input_ids.shape[0]}; they must "
                "match"
            )
        check_model("the cache", cache.model, describe(self.reader.backbone.model))
        if cache.longrope != self.reader.backbone.longrope:
            raise ValueError(
                f"the cache was read with longrope={cache.longrope!r} and this engine has "
                f"{self.reader.backbone.longrope!r}; use one with the same"
            )
        return torch.cat([ids, cache.unread_ids], dim=1).to(input_ids.device)
