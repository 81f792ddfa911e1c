"""A definition asked for among many files of code, made to a length.

A context is a seeded choice of whole files of CPython's standard library, each under a line with
its path. Every other question asks for a parameter's default value, the rest for the first line of
a function. Only one function of the context has that name, and the answer is copied from the code.

Models of code have read these files in their training: what is found by a policy that keeps next to
nothing of the context, such as streaming_llm, is known by heart.
"""

from collections.abc import Callable, Sequence
from functools import cache
from random import Random

from locret.tasks.base import Prompts, Sample
from locret.tasks.code_files import (
    Definition,
    Kind,
    SourceFile,
    defines,
    definitions,
    library_files,
    library_origin,
)
from locret.tasks.metrics import code_match
from locret.tasks.ruler_base import MadeTask

INTRO = "Below are files of a code base. A question about them will follow.\n"
FILE = "\n# ==== file: {path} ====\n{text}\n"
QUESTIONS: dict[Kind, str] = {
    "default": "\nIn the file {path}, what is the default value of the parameter `{of}` of the "
    "function `{function}`? Reply with the value alone, as it is in the code.",
    "line": "\nIn the file {path}, which line of code comes right after the line `{of}`? Reply "
    "with this line alone.",
}
ANSWERS: dict[Kind, str] = {
    "default": " The default value is `",
    "line": " The line after it is `",
}
KINDS: tuple[Kind, ...] = tuple(QUESTIONS)
Tokens = Callable[[SourceFile], int]
LARGEST = 3  # no file takes more than a third of the length


class CodeTask(MadeTask):
    """Name a default value or a line of code. `exact_match`: the answer gives just this."""

    name = "code"
    metrics = ("exact_match",)
    max_new_tokens = 64

    def origins(self) -> dict[str, str]:
        return library_origin()

    def made(self, count: int, prompts: Prompts) -> list[Sample]:
        @cache
        def tokens(file: SourceFile) -> int:
            text = FILE.format(path=file.path, text=file.text)
            ids = prompts.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return len(ids)

        return [self._sample(number, prompts, tokens) for number in range(count)]

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        return {"exact_match": code_match(answer, sample.answers)}

    def _sample(self, number: int, prompts: Prompts, tokens: Tokens) -> Sample:
        """Sample number `number`: it depends on no other one."""
        rng = Random(f"code {self.settings.seed} {number}")
        files = rng.sample(library_files(), len(library_files()))
        kind = KINDS[number % len(KINDS)]
        for file in files:
            asked = [found for found in definitions(file) if found.kind == kind]
            if asked and tokens(file) <= self.length // LARGEST:
                definition = rng.choice(asked)
                chosen = self._fitting(file, definition, files, prompts, tokens)
                rng.shuffle(chosen)
                return _asked(str(number), chosen, file, definition)
        raise self.does_not_fit()

    def _fitting(
        self,
        file: SourceFile,
        definition: Definition,
        files: Sequence[SourceFile],
        prompts: Prompts,
        tokens: Tokens,
    ) -> list[SourceFile]:
        """The file and as many others as fit beside it."""

        def room(chosen: list[SourceFile]) -> int:
            used = prompts.measure(_asked("", chosen, file, definition))
            return self.length - self.max_new_tokens - used

        chosen, left = [file], room([file])
        for other in files:
            size = tokens(other)
            fits = size <= min(left, self.length // LARGEST)
            if other is not file and fits and not defines(other.text, definition.function):
                chosen.append(other)
                left -= size
        while len(chosen) > 1 and room(chosen) < 0:  # tokens that reach over the end of a file
            chosen.pop()
        return chosen


def _asked(
    name: str, chosen: Sequence[SourceFile], file: SourceFile, definition: Definition
) -> Sample:
    """The question about a file among those chosen."""
    texts = (FILE.format(path=each.path, text=each.text) for each in chosen)
    return Sample(
        id=name,
        context=INTRO + "".join(texts),
        question=QUESTIONS[definition.kind].format(
            path=file.path, of=definition.of, function=definition.function
        ),
        answers=(definition.answer,),
        answer_prefix=ANSWERS[definition.kind],
    )
