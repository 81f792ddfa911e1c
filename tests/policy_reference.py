"""Naive twins of the policies: units in Python lists, one head and one query at a time.

A rule gives the scores of one head's units from its paper's formula. Uses the model's own
submodules and, of locret, nothing.
"""

import math
from dataclasses import dataclass, field

import torch
from torch.nn.functional import cosine_similarity

from tests.reference import project, rotate

INFINITE = float("inf")


@dataclass
class Unit:
    position: int
    key: torch.Tensor  # [D], before RoPE
    value: torch.Tensor  # [D]
    mass: float = 0.0  # attention received so far, mean over the group
    surprisal: float = INFINITE
    turned: torch.Tensor | None = None  # the key at its slot
    weight: float = 1.0  # tokens that the value is the mean of
    score: float = 0.0  # of the last eviction


@dataclass
class Layer:
    """What a rule may look at. `queries` [tokens so far][H*G, D] before RoPE."""

    model: object
    scaling: float
    units: list
    queries: list = field(default_factory=list)
    new: int = 0

    @property
    def group(self):
        return len(self.queries[0]) // len(self.units)

    def weights(self, query_head, back, folds=False):
        """Attention of the query `back` tokens before the last one, over the units it sees, which
        count for what was folded into them, or not."""
        units = self.units[query_head // self.group]
        slot = len(units) - 1 - back
        query = rotate(self.model, self.queries[-1 - back][query_head], slot)
        logits = torch.stack([query @ unit.turned for unit in units[: slot + 1]])
        bias = torch.tensor([unit.weight for unit in units[: slot + 1]]).log() if folds else 0
        return (logits * self.scaling + bias).softmax(dim=0)


class Rule:
    recent = staticmethod(lambda budget: 0)

    def after_chunk(self, layer):
        """Once a layer and chunk, before scores are asked for."""

    def scores(self, layer, head):
        raise NotImplementedError

    def budgets(self, budget, layers):
        return [budget] * layers

    def counts(self, scores, budgets):
        """Units to keep [layer][head], given scores [layer][head][unit]; infinite = in any case."""
        return [[budget] * len(layer) for layer, budget in zip(scores, budgets, strict=True)]


class KNorm(Rule):
    def scores(self, layer, head):
        return [-unit.key.norm().item() for unit in layer.units[head]]


class KeyDiff(Rule):
    def scores(self, layer, head):
        keys = [unit.turned for unit in layer.units[head]]
        mean = sum(key / key.norm() for key in keys) / len(keys)
        return [-cosine_similarity(key, mean, dim=0).item() for key in keys]


class StreamingLLM(Rule):
    def __init__(self, sinks=4):
        self.sinks = sinks

    def scores(self, layer, head):
        return [INFINITE if u.position < self.sinks else u.position for u in layer.units[head]]


class TOVA(Rule):
    def scores(self, layer, head):
        heads = [layer.weights(q, 0) for q in range(len(layer.queries[0]))]
        mean = torch.stack(heads).mean(dim=0)
        mean[-1] = INFINITE
        return mean.tolist()


class H2O(Rule):
    recent = staticmethod(lambda budget: budget // 2)

    def after_chunk(self, layer):
        for query_head in range(len(layer.queries[0])):
            for back in range(layer.new):
                weights = layer.weights(query_head, back).tolist()
                units = layer.units[query_head // layer.group]
                for unit, weight in zip(units, weights, strict=False):
                    unit.mass += weight / layer.group

    def scores(self, layer, head):
        return [unit.mass for unit in layer.units[head]]


class SnapKV(Rule):
    def __init__(self, window=32, kernel=5, pooling="avg"):
        self.window, self.kernel, self.pooling = window, kernel, pooling
        self.recent = lambda budget: window

    def scores(self, layer, head):
        units = layer.units[head]
        window = min(self.window, len(units), len(layer.queries))
        before = len(units) - window
        total = [0.0] * before
        for query_head in range(head * layer.group, (head + 1) * layer.group):
            received = [0.0] * before
            for back in range(window):
                weights = layer.weights(query_head, back).tolist()
                received = [r + w for r, w in zip(received, weights[:before], strict=True)]
            for i in range(before):
                half = self.kernel // 2
                near = received[max(i - half, 0) : i + half + 1]
                total[i] += max(near) if self.pooling == "max" else sum(near) / self.kernel
        return [received / layer.group for received in total] + [INFINITE] * window


class PyramidKV(SnapKV):
    def __init__(self, window=8, kernel=7, pooling="max", beta=20):
        super().__init__(window, kernel, pooling)
        self.beta = beta

    def budgets(self, budget, layers):
        free = budget - self.window
        last, first = free / self.beta, 2 * free - free / self.beta
        exact = [first + (last - first) * i / (layers - 1) for i in range(layers)]
        whole = [self.window + int(x) for x in exact]
        left = budget * layers - sum(whole)
        return [units + (i < left) for i, units in enumerate(whole)]


class SirLLM(Rule):
    def __init__(self, sinks=4, recent=512, decay=1.0):
        self.sinks, self.decay = sinks, decay
        self.recent = lambda budget: min(recent, budget // 3)

    def after_chunk(self, layer):
        for units in layer.units if layer.new > 1 else []:
            for unit in units[: -layer.new]:
                unit.surprisal *= self.decay

    def scores(self, layer, head):
        return [INFINITE if u.position < self.sinks else u.surprisal for u in layer.units[head]]


class ExpectedAttention(Rule):
    def __init__(self, future=512, sinks=4):
        self.future, self.sinks = future, sinks
        self.turns = {}  # by the first slot: where each basis vector goes on average

    def turn(self, model, first, size):
        if first not in self.turns:
            slots = range(first, first + self.future)
            turns = [torch.stack([rotate(model, e, s) for s in slots]) for e in torch.eye(size)]
            self.turns[first] = torch.stack([turned.mean(dim=0) for turned in turns])
        return self.turns[first]

    def scores(self, layer, head):
        units, size = layer.units[head], layer.units[head][0].key.shape[0]
        turn = self.turn(layer.model, len(units), size)
        free = [unit for unit in units if unit.position >= self.sinks]
        total = torch.zeros(len(free))
        for query_head in range(head * layer.group, (head + 1) * layer.group):
            queries = [query[query_head] for query in layer.queries[self.sinks :]]
            if not queries or not free:
                continue
            mean = sum(queries) / len(queries)
            spread = sum(torch.outer(q - mean, q - mean) for q in queries) / len(queries)
            mean, spread = mean @ turn, turn.T @ spread @ turn
            z = [
                u.turned @ mean / size**0.5 + u.turned @ spread @ u.turned / (2 * size)
                for u in free
            ]
            total += torch.stack(z).softmax(dim=0) / layer.group
        scores = [
            score.item() * u.value.norm().item() for score, u in zip(total, free, strict=True)
        ]
        return [INFINITE] * (len(units) - len(free)) + scores


def with_certain(row, count):
    """The scores of a head, infinite where they are among the `count` highest."""
    best = sorted(range(len(row)), key=lambda i: row[i], reverse=True)[:count]
    return [INFINITE if i in best else x for i, x in enumerate(row)]


def shared_by_heads(rows, total, floor):
    rows = [with_certain(row, floor) for row in rows]
    every = sorted(((x, h) for h, row in enumerate(rows) for x in row), reverse=True)
    return [sum(head == h for _, head in every[:total]) for h in range(len(rows))]


class AdaptiveHeads(Rule):
    def __init__(self, rule, floor=0.2):
        self.rule, self.floor = rule, floor
        self.recent, self.scores, self.after_chunk = rule.recent, rule.scores, rule.after_chunk

    def counts(self, scores, budgets):
        below = self.rule.counts(scores, budgets)
        return [
            shared_by_heads(
                rows, min(sum(shares), sum(map(len, rows))), int(self.floor * shares[0])
            )
            for rows, shares in zip(scores, below, strict=True)
        ]


class SharedLayers(AdaptiveHeads):
    def counts(self, scores, budgets):
        layers = []
        for rows, budget in zip(scores, budgets, strict=True):
            known = [x for row in rows for x in row if x < INFINITE]
            mean = sum(known) / max(len(known), 1)
            spread = (sum((x - mean) ** 2 for x in known) / max(len(known), 1)) ** 0.5
            scaled = [[(x - mean) / (spread or 1) for x in row] for row in rows]
            layers.append([with_certain(row, int(self.floor * budget)) for row in scaled])
        every = [(x, i) for i, rows in enumerate(layers) for row in rows for x in row]
        total = sum(budget * len(scores[0]) for budget in budgets)
        best = sorted(every, reverse=True)[:total]
        shares = [
            sum(layer == i for _, layer in best) // len(scores[i]) for i in range(len(layers))
        ]
        return [[share] * len(rows) for share, rows in zip(shares, scores, strict=True)]


RULES = {
    "expected_attention": ExpectedAttention,
    "h2o": H2O,
    "keydiff": KeyDiff,
    "knorm": KNorm,
    "pyramidkv": PyramidKV,
    "sirllm": SirLLM,
    "snapkv": SnapKV,
    "streaming_llm": StreamingLLM,
    "tova": TOVA,
}


def read(*args, **kwargs):
    """Kept source positions [layer][KV head] after the last eviction, and the scores of all units
    at that eviction, likewise (arguments: `run`)."""
    layers, scores = run(*args, **kwargs)
    return [[[u.position for u in units] for units in layer.units] for layer in layers], scores


@torch.no_grad()
def run(
    model, rule, tokens, budget, chunk_size, stabilizers, together=0, drop=0, merging=None, query=0
):
    """The layers after the last eviction, and the scores of all units at that eviction.

    The last `together` tokens are in one chunk; the last `drop` ones are not kept. The values of
    evicted units are merged by `merging`, but not into the first `query` units.
    """
    config, size = model.config, chunk_size or len(tokens)
    layers = [Layer(model, each.self_attn.scaling, []) for each in model.model.layers]
    for layer in layers:
        layer.units = [[] for _ in range(config.num_key_value_heads)]
    budgets = rule.budgets(budget, len(layers))
    starts = [*range(0, max(len(tokens) - together, 1), size)]
    last_logits, scores = None, None
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        final = end == len(tokens)
        folds = merging is not None and merging.fold
        logits = forward(model, rule, layers, tokens[start:end], start, folds)
        surprise(layers, tokens[start:end], last_logits, logits)
        last_logits = logits[-1]
        scores = [
            [rule.scores(layer, head) for head in range(len(layer.units))] for layer in layers
        ]
        gone = drop if final else 0
        tails = [
            min(kept, max(0 if final else stabilizers, rule.recent(kept) - gone))
            for kept in budgets
        ]
        sure = [
            [
                [*row[: len(row) - gone - tail], *[INFINITE] * min(tail, len(row))]
                for row in of_layer
            ]
            for of_layer, tail in zip(scores, tails, strict=True)
        ]
        if max(len(row) for of_layer in sure for row in of_layer) <= min(budgets):
            counts = [[len(row) for row in of_layer] for of_layer in sure]
        else:
            counts = rule.counts(sure, budgets)
        for layer, of_layer, share, tail in zip(layers, scores, counts, tails, strict=True):
            kept = [
                evict(units, row, count, tail, gone)
                for units, row, count in zip(layer.units, of_layer, share, strict=True)
            ]
            for units, row, stay in zip(layer.units, of_layer, kept, strict=True):
                for unit, score in zip(units, row, strict=True):
                    unit.score = score
                if merging is not None:
                    merge(units[: len(units) - gone], stay, merging, query)
            layer.units = kept
    return layers, scores


def forward(model, rule, layers, tokens, start, folds):
    """Read a chunk into the layers. Returns logits [T, vocabulary]."""
    hidden = model.model.embed_tokens(torch.tensor([tokens]))
    for stock, layer in zip(model.model.layers, layers, strict=True):
        residual = hidden
        query, key, value = project(model, stock.self_attn, stock.input_layernorm(hidden))
        for head, units in enumerate(layer.units):
            units.extend(Unit(start + t, key[t, head], value[t, head]) for t in range(len(tokens)))
            for slot, unit in enumerate(units):
                unit.turned = rotate(model, unit.key, slot)
        layer.queries.extend(query)
        layer.new = len(tokens)
        hidden = residual + stock.self_attn.o_proj(look(layer, folds))
        hidden = hidden + stock.mlp(stock.post_attention_layernorm(hidden))
        rule.after_chunk(layer)
    return model.lm_head(model.model.norm(hidden))[0]


def look(layer, folds):
    rows = []
    for back in reversed(range(layer.new)):
        outputs = []
        for query_head in range(len(layer.queries[0])):
            weights = layer.weights(query_head, back, folds)
            units = layer.units[query_head // layer.group][: len(weights)]
            outputs.append(weights @ torch.stack([unit.value for unit in units]))
        rows.append(torch.cat(outputs))
    return torch.stack(rows)[None]


def surprise(layers, tokens, last_logits, logits):
    """-log p of each token, given the logits of the token before it."""
    before = [last_logits, *logits[:-1]]
    for layer in layers:
        for units in layer.units:
            for unit, token, row in zip(units[-len(tokens) :], tokens, before, strict=True):
                if row is not None:
                    unit.surprisal = -row.log_softmax(dim=0)[token].item()


def evict(units, scores, budget, protected, drop):
    """The `budget` units to keep, in order: the last `protected`, then the highest scores."""
    end = len(units) - drop
    units, scores = units[:end], scores[:end]
    if len(units) <= budget:
        return units
    protected = min(protected, budget)
    free = len(units) - protected
    best = sorted(range(free), key=lambda i: scores[i], reverse=True)[: budget - protected]
    return [units[i] for i in sorted(best)] + units[free:]


def merge(units, kept, merging, query=0):
    """Value merging as `locret.cache.merging` says it, into the units of `kept`, one evicted unit
    after the other."""
    takers = [unit for unit in kept if unit.position >= max(merging.sinks, query)]
    slot = {unit.position: i for i, unit in enumerate(units)}
    stay = {unit.position for unit in kept}
    pairs = []
    for unit in units:
        if unit.position in stay or not takers:
            continue
        likeness = [cosine_similarity(unit.key, t.key, dim=0).item() for t in takers]
        if merging.into == "similar":
            best = max(range(len(takers)), key=lambda i: likeness[i])
        else:
            far = [abs(slot[taker.position] - slot[unit.position]) for taker in takers]
            best = min(range(len(takers)), key=lambda i: (far[i], -i))
        pairs.append((unit, takers[best], likeness[best]))
    least = merging.threshold
    if least == "mean":
        least = sum(cosine for _, _, cosine in pairs) / max(len(pairs), 1)
    for taker in takers:
        given = [
            unit
            for unit, other, cosine in pairs
            if other is taker and (least is None or cosine >= least - 1e-6)
        ]
        if given:
            shares = [unit.weight * (folded(unit, taker) if merging.fold else 1) for unit in given]
            total = taker.weight + sum(shares)
            added = sum(share * unit.value for share, unit in zip(shares, given, strict=True))
            taker.value = (taker.weight * taker.value + added) / total
            taker.weight = total


def folded(unit, taker):
    """How much of an evicted unit counts."""
    return 1.0 if unit.score >= taker.score else math.exp(unit.score - taker.score)
