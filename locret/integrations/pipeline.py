"""A pipeline of transformers: questions about a long context, read within a budget.

    import locret.integrations.pipeline  # makes the task "locret" known
    from transformers import pipeline

    answers = pipeline("locret", model="Qwen/Qwen3-4B", heads="runs/qwen3/heads", budget="8x")
    answers(book, question="Who did it?")["answer"]
    answers(book, questions=["Who did it?", "And why?"])["answers"]

Called as kvpress's `kv-press-text-generation` is, with the settings of `locret.Engine` in the place
of a press. The context is read once; every question sees it as it was read, and no other question.
Query-aware engines read it once for each question.
"""

import inspect
import logging
import uuid
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from locret.engine.engine import Engine
from locret.heads.heads import RetainingHeads
from locret.policies import policy_in_words

TASK = "locret"
MAX_NEW_TOKENS = 50
SETTINGS = frozenset(inspect.signature(Engine.__init__).parameters) - {"self", "model"}

_Pipeline: Any = Pipeline  # its annotations are not what it asks of its subclasses

logger = logging.getLogger(__name__)


class LocretPipeline(_Pipeline):
    """Questions about a context, within a budget.

    Args:
        heads: retaining heads, or where they are: a folder, a Hub id, a released .bin.
        **kwargs: settings of `locret.Engine` (policy, budget, chunk_size, ...), and what every
            pipeline takes (model, tokenizer, device, ...).

    Raises:
        ValueError: settings that the engine refuses, or heads of another model.
    """

    _load_tokenizer = True
    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False

    def __init__(self, *args: Any, heads: Any = None, **kwargs: Any) -> None:
        settings = {name: kwargs.pop(name) for name in SETTINGS & kwargs.keys()}
        super().__init__(*args, **kwargs)
        if heads is not None and not isinstance(heads, RetainingHeads):
            heads = RetainingHeads.from_pretrained(heads)
        chat = self.tokenizer.chat_template is not None
        policy = settings.pop("policy", "locret")
        if isinstance(policy, str):
            policy = policy_in_words(policy, self.tokenizer, chat)
        self.engine = Engine(self.model, policy, heads=heads, **settings)
        config = self.engine.config
        self._asks_first = config.reading.budget is not None and (
            config.reading.query_aware or config.recorded.query_tokens > 0
        )

    def _sanitize_parameters(
        self,
        question: str | None = None,
        questions: Sequence[str] | None = None,
        answer_prefix: str = "",
        max_new_tokens: int = MAX_NEW_TOKENS,
        max_context_length: int | None = None,
        enable_thinking: bool = False,
        **generating: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """What a call takes beside its context (a text, or a list of texts).

        Args:
            question: what is asked; the answer is returned as {"answer": text}.
            questions: several, in its place; returned as {"answers": [text, ...]}.
            answer_prefix: first words of every answer; they are not returned.
            max_new_tokens: of an answer.
            max_context_length: tokens of the context; what is beyond is cut off, with a warning.
                None = no limit: a bounded cache reads any length.
            enable_thinking: for chat templates that know it.
            **generating: of stock `generate`, such as do_sample and temperature. Greedy by default.

        Raises:
            ValueError: a question and questions, or one text in the place of several.
        """
        if question is not None and questions is not None:
            raise ValueError("question and questions are both given; give one of them")
        if isinstance(questions, str):
            raise ValueError("questions is one text; give a list of them, or question=...")
        asked = [question or ""] if questions is None else list(questions)
        reading = {
            "questions": asked,
            "answer_prefix": answer_prefix,
            "max_context_length": max_context_length,
            "enable_thinking": enable_thinking,
        }
        answering = {"do_sample": False} | generating | {"max_new_tokens": max_new_tokens}
        return reading, answering, {"single": questions is None}

    def preprocess(
        self,
        context: str,
        questions: Sequence[str],
        answer_prefix: str,
        max_context_length: int | None,
        enable_thinking: bool,
    ) -> dict[str, Any]:
        """Token ids of the context [1, n], and of each question with what follows it [1, q]."""
        before, after = self._around_question(context, enable_thinking)
        context_ids = self._ids(before)
        if max_context_length is not None and context_ids.shape[1] > max_context_length:
            logger.warning(
                "the context has %d tokens and is cut to max_context_length, %d",
                context_ids.shape[1],
                max_context_length,
            )
            context_ids = context_ids[:, :max_context_length]
        asked = [self._ids(question + after + answer_prefix) for question in questions]
        return {"context_ids": context_ids, "question_ids": asked}

    def _around_question(self, context: str, enable_thinking: bool) -> tuple[str, str]:
        """The text in front of a question, and behind it."""
        if self.tokenizer.chat_template is None:
            return (self.tokenizer.bos_token or "") + context, "\n"
        place = uuid.uuid4().hex
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": context + place}],
            add_generation_prompt=True,
            tokenize=False,
            enable_thinking=enable_thinking,
        )
        before, _, after = text.partition(place)
        return before, after

    def _ids(self, text: str) -> Tensor:
        # verbose=False: texts beyond the model's window are what this is for.
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor([ids], dtype=torch.long)

    def _forward(self, model_inputs: dict[str, Any], **generating: Any) -> list[str]:
        """The answers to all questions."""
        context, questions = model_inputs["context_ids"], model_inputs["question_ids"]
        read = partial(self.engine.prefill, context, torch.ones_like(context))
        with self.engine:
            if self._asks_first:
                return [self._answer(read(query_ids=q), q, generating) for q in questions]
            cache = read()
            untouched, answers = cache.snapshot(), []
            for question in questions:
                cache.restore(untouched)
                answers.append(self._answer(cache, question, generating))
            return answers

    def _answer(self, cache: Any, question: Tensor, generating: dict[str, Any]) -> str:
        mask = torch.ones_like(question)
        output = self.engine.generate(question, mask, cache=cache, **generating)
        new = output[0, question.shape[1] :]
        return str(self.tokenizer.decode(new, skip_special_tokens=True))

    def postprocess(self, model_outputs: list[str], single: bool) -> dict[str, Any]:
        return {"answer": model_outputs[0]} if single else {"answers": model_outputs}


PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=LocretPipeline, pt_model=AutoModelForCausalLM
)
