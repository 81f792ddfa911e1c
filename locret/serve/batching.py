"""Which waiting requests are answered together."""

from collections.abc import Iterable

from locret.serve.jobs import AskJob, Job

LONG = 8192
"""Tokens from which on reading a prompt takes a device so long that it shows."""


def next_batch(waiting: Iterable[Job], most: int, most_units: int | None = None) -> list[Job]:
    """The first job, and in their order those behind it that can be answered with it.

    Args:
        waiting: the one that came first, first.
        most: jobs of a batch.
        most_units: that a KV head of all of them together can hold; None = not known.
    """
    jobs = iter(waiting)
    first = next(jobs)
    if not isinstance(first, AskJob):
        return [first]
    kind, chosen, units = _kind(first), [first], first.most_units
    for job in jobs:
        if len(chosen) >= most:
            break
        if not isinstance(job, AskJob) or _kind(job) != kind:
            continue
        if most_units is None or units + job.most_units <= most_units:
            chosen.append(job)
            units += job.most_units
    return [*chosen]


def _kind(job: AskJob) -> tuple[object, ...]:
    """What requests of a batch agree in. Stock `generate` has one way to sample for all rows, and
    one generator: a seed is for one request. The engine cannot ask questions of one token together
    with longer ones. Short prompts do not wait until long ones are read."""
    ask, length = job.ask, len(job.question)
    has_context = bool(ask.context is not None or job.shared)
    shape = has_context, has_context and length == 1, length > LONG
    if ask.temperature == 0:
        return (*shape, "greedy")
    alone = None if ask.seed is None else id(job)
    return (*shape, ask.temperature, ask.top_p, alone)
