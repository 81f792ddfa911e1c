"""From a budget, in whatever form, to units: what every layer and every KV head keeps of a context.

A budget names units on average, a share of the context or bytes; the policy shares it out over
layers, quotas (`locret.heads.quotas`) over heads. Bytes hold as many units as fit once both did.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence

from locret.cache.sizing import Sizing
from locret.heads.quotas import Quotas, on_grid, unit_counts
from locret.policies import Policy
from locret.quantities import Budget, ByteShare, Memory, format_bytes

BYTES_IN_16_BITS = 2


def layer_budgets(
    budget: Budget, quotas: Quotas | None, policy: Policy, sizing: Sizing, context: int
) -> tuple[int, ...] | None:
    """Units that every layer keeps of a context of that many tokens, as the policy shares them out
    and before quotas do; None = all. ValueError: not one unit fits into the memory."""
    if budget is None or not sizing.num_layers:
        return None
    if isinstance(budget, tuple):
        return budget

    def of_layers(average: int) -> Sequence[int]:
        return sizing.shared(policy.budgets(average, sizing.num_layers, context))

    if isinstance(budget, Memory | ByteShare):
        sharing = 0 if not policy.shares else 2 if policy.waits or policy.rereads else 1

        def needed(average: int) -> int:
            counts = head_counts(of_layers(average), quotas, sizing.num_kv_heads, context)
            return sizing.read_bytes(counts, context, sharing)

        units = _units_within(budget, sizing, context, needed)
    else:
        units = budget if isinstance(budget, int) else max(1, round(budget * context))
    return tuple(of_layers(units))


def head_counts(
    budgets: Sequence[int], quotas: Quotas | None, heads: int, context: int
) -> tuple[tuple[int, ...], ...]:
    """Units that each of the `heads` KV heads of every layer keeps, [layers][KV heads].

    Layers' budgets are dealt out by the quotas for what all of them together leave of the context.
    A head that may keep the whole context has its layer's budget, if that is more.
    """
    if quotas is None:
        return tuple((budget,) * heads for budget in budgets)
    context = max(context, 1)
    kept = sum(min(budget, context) for budget in budgets)
    counts = unit_counts(quotas.at(context * len(budgets) / kept), budgets, context)
    if any(len(set(layer)) > 1 for layer in counts):
        counts = on_grid(counts, context)
    return tuple(
        tuple(max(units, budget) if units == context else units for units in layer)
        for layer, budget in zip(counts, budgets, strict=True)
    )


def full_bytes(sizing: Sizing, tokens: int) -> int:
    """Keys and values of so many tokens in 16 bits, in the layers without a window."""
    elements = 2 * sizing.head_size * sizing.num_kv_heads * sizing.num_layers
    return tokens * elements * BYTES_IN_16_BITS


def _units_within(
    budget: Memory | ByteShare, sizing: Sizing, context: int, needed: Callable[[int], int]
) -> int:
    """Units on average that fit, at least 1.

    A share of the full cache's bytes is that of the layers without a window, and one unit in every
    head is kept where not even that is a share of them.

    Args:
        needed: bytes where heads keep so many units on average.
    """
    most, windows = range(1, max(context, 1) + 1), sizing.window_bytes(context)
    if isinstance(budget, ByteShare):
        nbytes = int(budget.share * full_bytes(sizing, context))
        return max(1, bisect_right(most, nbytes, key=needed))
    units = bisect_right(most, budget.nbytes - windows, key=needed)
    if not units:
        also = f", sliding windows {format_bytes(windows)}" if windows else ""
        raise ValueError(
            f"budget is {format_bytes(budget.nbytes)}; one unit in every KV head takes "
            f"{format_bytes(needed(1))}{also}"
        )
    return units
