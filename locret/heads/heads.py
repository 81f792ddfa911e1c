"""Retaining heads: a small module a layer that says how much every cache unit will be needed.

Paper section 3.1. The config says what, `RetainingHead` (`locret.heads.kinds`) is one layer,
`RetainingHeads` all of them.

H KV heads, G query heads a KV head, D head size, W = (H*G + 2H) * D, R width of a head.
"""

import dataclasses
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from locret.heads import files as artifact
from locret.heads import hub
from locret.heads.hub import DEFAULT_LICENSE
from locret.heads.kinds import FEATURES, GateHead, LinearHead, MLPHead, RetainingHead
from locret.heads.quotas import quotas_of
from locret.heads.targets import LABELS

SCHEMA_VERSION = 1
LongRopeRule = Literal["long", "by_length"]
"""How LongRoPE chooses its factors (`locret.model.rotary`); the record says for which rule heads
are."""

HeadKind = Literal["mlp", "linear"]
"""What a head that is trained here computes (`locret.heads.kinds`)."""

RELEASED_ACTIVATION = "silu"  # of every backbone that heads were released for

CHOICES: dict[str, Collection[str]] = {
    "activation": ACT2FN,
    "kind": (*get_args(HeadKind), "gate"),
    "label": LABELS,
    "longrope": get_args(LongRopeRule),
    "origin": ("locret", artifact.KVZAP, artifact.FAST_KVZIP),
    "positions": ("compact", "original"),
    "tap": FEATURES,
}
"""What the record's words may be."""

LOG_SCORE = -6.5
"""Where scores of heads that learn a logarithm start, so that Smooth-L1 need not learn a constant
first: between the means of log(max_prob + 1e-5) on SmolLM2-135M, -8 from short answers and -5 from
a repetition of the whole context (1,000 and 2,000 tokens)."""

_LATER_FIELDS = {
    "backbone_sha256": None,
    "bias": False,
    "kind": "mlp",
    "origin": "locret",
    "quotas": None,
    "sinks": None,
}
"""Fields that records of this schema had not from the start, and what they are without."""


@dataclass(frozen=True)
class Geometry:
    """The shape of a backbone, as far as heads depend on it.

    Attributes:
        num_layers: attention layers whose units are scored and evicted. Layers with a sliding
            window are none of them: they have no heads.
        num_query_heads, num_kv_heads, head_size: the attention layers'.
        hidden_size: of the layers' input.
        activation: the backbone's `hidden_act`, which the heads use too.
    """

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    activation: str

    def feature_width(self, tap: str) -> int:
        """Length of what a head reads of a token (`FEATURES`); W for `qkv`. ValueError: an unknown
        tap."""
        if tap not in FEATURES:
            raise ValueError(f"tap {tap!r} is unknown; expected one of {sorted(FEATURES)}")
        with torch.device("meta"):  # the table's function itself says how long: no second table
            query = torch.empty(1, self.num_query_heads, 1, self.head_size)
            key = torch.empty(1, self.num_kv_heads, 1, self.head_size)
            token: Any = SimpleNamespace(
                query=query, key=key, value=key, hidden=torch.empty(1, 1, self.hidden_size)
            )
            return FEATURES[tap](token).shape[-1]


@dataclass(frozen=True)
class HeadsConfig:
    """Everything that a heads artifact records beside its weights.

    Attributes:
        num_layers, num_query_heads, num_kv_heads, head_size, activation: see `Geometry`. The
            released format does not tell query heads from head size: both are then None.
        hidden_size: see `Geometry`; None in the released format.
        input_width: length of what a head reads of a token.
        width: R, the hidden width of a head; None for linear ones.
        kind: what a head computes: "mlp", "linear" or "gate" (`locret.heads.kinds`).
        bias: whether the matrices of an MLP or a linear head have biases.
        sinks: learned keys of a gate; None for others.
        origin: whose method the heads are of (`locret.heads.files`). Others than locret's choose
            their activation whatever the backbone's is.
        backbone, backbone_revision, model_type: what the heads were trained on.
        backbone_sha256: of the backbone's weights, where they are one file.
        adapter: the PEFT adapter that the backbone carried, if any.
        tap: what a head reads (`FEATURES`).
        query_tokens: Locret-Q: how many of the prompt's last tokens, the question, were repeated in
            front of it, so that the heads know what is asked; 0 = query-agnostic.
        label: the label definition (`locret.heads.targets.LABELS`).
        positions: the cache positions that the heads were validated with.
        longrope: the LongRoPE rule that the heads were trained with.
        trained_tokens: the longest prompt in training.
        defaults: engine settings to use when the user gives none: `budget`, `chunk_size`,
            `stabilizers`, `local_tokens`.
        metrics: figures of the training run, by name.
        quotas: which heads keep how much, by compression: {"2": `[layers][KV heads]`, ...}
            (`locret.heads.quotas`); None = all alike.
        license: of the heads, as the Hub names it.
        schema_version: of this record.
    """

    num_layers: int
    num_kv_heads: int
    input_width: int
    width: int | None
    activation: str = RELEASED_ACTIVATION
    num_query_heads: int | None = None
    head_size: int | None = None
    hidden_size: int | None = None
    kind: str = "mlp"
    bias: bool = False
    sinks: int | None = None
    origin: str = "locret"
    backbone: str | None = None
    backbone_revision: str | None = None
    backbone_sha256: str | None = None
    model_type: str | None = None
    adapter: str | None = None
    tap: str = "qkv"
    query_tokens: int = 0
    label: str = "max_logit"
    positions: str = "compact"
    longrope: str = "long"
    trained_tokens: int | None = None
    defaults: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    quotas: dict[str, list[list[float]]] | None = None
    license: str = DEFAULT_LICENSE
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def for_geometry(
        cls, geometry: Geometry, width: int | None, tap: str = "qkv", **record: Any
    ) -> "HeadsConfig":
        """The config of heads of hidden width `width` (None for linear ones) for a backbone of
        this geometry.

        Raises:
            ValueError: a backbone without layers whose units are evicted, or an unknown tap.
        """
        if not geometry.num_layers:
            raise ValueError(
                "every layer of this backbone attends within a sliding window, which bounds its "
                "cache by itself: there is nothing for heads to decide"
            )
        return cls(
            **dataclasses.asdict(geometry),
            input_width=geometry.feature_width(tap),
            width=width,
            tap=tap,
            **record,
        )

    def __post_init__(self) -> None:
        wrong = _wrong_values(dataclasses.asdict(self))
        if wrong:
            raise ValueError(f"heads config: {'; '.join(wrong)}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "HeadsConfig":
        """Read a record back. ValueError: a newer schema, or fields missing, unknown or with values
        that cannot be; they are named."""
        version = values.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"heads config has schema_version {version!r}; this locret reads {SCHEMA_VERSION}: "
                "upgrade locret, or convert the heads again"
            )
        fields = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(values.keys() - fields.keys())
        missing = sorted(
            name
            for name, f in fields.items()
            if f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
            and name not in values
        )
        if unknown or missing:
            raise ValueError(f"heads config: missing fields {missing}, unknown fields {unknown}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The record as it is written. Later fields are left out where they say nothing: versions
        before them read such a record too, and refuse others by the name of the field."""
        values = dataclasses.asdict(self)
        silent = [name for name, without in _LATER_FIELDS.items() if values[name] == without]
        return {name: v for name, v in values.items() if name not in silent}

    @property
    def learns_logarithm(self) -> bool:
        """Whether scores are logarithms of attention: on one scale for all heads."""
        return is_logarithm(self.label)

    def differences(self, geometry: Geometry) -> list[str]:
        """What keeps these heads from fitting a backbone; empty if they fit."""
        ours = {f.name: getattr(self, f.name) for f in dataclasses.fields(Geometry)}
        theirs = dataclasses.asdict(geometry)
        ours["input_width"] = self.input_width
        if self.origin != "locret":
            ours["activation"] = None
        theirs["input_width"] = geometry.feature_width(self.tap)
        return [
            f"{name}: heads {ours[name]!r}, backbone {theirs[name]!r}"
            for name in theirs
            if ours[name] is not None and ours[name] != theirs[name]
        ]


def _wrong_values(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with the values of a record, in words."""
    wrong = []
    at_least = {"query_tokens": 0}
    for name, kind in get_type_hints(HeadsConfig).items():
        value = values[name]
        if name == "quotas":
            wrong += _wrong_quotas(values)
        elif not _is_a(value, kind):
            wrong.append(f"{name} is {value!r}, expected {kind}")
        elif type(value) is int and value < at_least.get(name, 1):
            wrong.append(f"{name} is {value}, expected at least {at_least.get(name, 1)}")
        elif name in CHOICES and value not in CHOICES[name]:
            wrong.append(f"{name} {value!r} is unknown; expected one of {sorted(CHOICES[name])}")
    return wrong or _wrong_shape(values)


def _wrong_shape(values: Mapping[str, Any]) -> list[str]:
    """What fields that are right by themselves have against each other."""
    kind, width, sinks = (values[name] for name in ("kind", "width", "sinks"))
    wrong = []
    if (kind == "linear") != (width is None) or (kind == "gate") != (sinks is not None):
        wrong.append(
            f"width is {width} and sinks {sinks} with kind {kind!r}; expected a width but for "
            "linear heads, and sinks for gates alone"
        )
    queries, heads = values["num_query_heads"], values["num_kv_heads"]
    if kind == "gate" and (queries is None or queries % heads):
        wrong.append(f"num_query_heads is {queries}; a gate needs a multiple of {heads} KV heads")
    return wrong


def _wrong_quotas(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with the quotas of a record; none are right for heads of any shape."""
    given = values["quotas"]
    if given is None:
        return []
    if not (isinstance(given, dict) and all(isinstance(table, list) for table in given.values())):
        return [f"quotas are a {type(given).__name__}, expected lists of lists by compression"]
    try:
        quotas = quotas_of(given)
        if quotas is not None:
            quotas.check_shape(values["num_layers"], values["num_kv_heads"])
    except ValueError as error:
        return [str(error)]
    return []


def _is_a(value: Any, kind: Any) -> bool:
    if get_origin(kind) is dict:
        _, of = get_args(kind)
        numbers = (int, float) if of is float else of
        return isinstance(value, dict) and all(isinstance(v, numbers) for v in value.values())
    return isinstance(value, kind) and isinstance(value, bool) == (kind is bool)


class RetainingHeads(nn.Module):
    """The retaining heads of all layers of a backbone.

    Args:
        config: shapes and record. Weights start at random; biases so that the scores of heads that
            learn a logarithm start at `LOG_SCORE`.
    """

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(_head(config) for _ in range(config.num_layers))

    def __getitem__(self, layer_idx: int) -> RetainingHead:
        head = self.layers[layer_idx]
        assert isinstance(head, RetainingHead)
        return head

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None, token: str | None = None
    ) -> "RetainingHeads":
        """Load heads from a folder, a Hub id, or a released `.bin` file. Runs no code from it.

        Heads of other methods are read from their own files (`locret.heads.files`): KVzap's from a
        folder or Hub id, Fast KVzip's from a `.pt` file, here or on the Hub as OWNER/NAME/FILE.

        Args:
            source: an artifact folder, a `.bin` in the released format, or a Hub repository id.
            revision: of the Hub repository.
            token: for a private one.

        Raises:
            ValueError: nothing usable there, or tensors missing, extra or misshapen; named.
        """
        record, tensors = artifact.load(source, revision=revision, token=token)
        if record is None:
            gates = artifact.fast_kvzip(tensors)
            config = HeadsConfig(**gates) if gates else _released_config(tensors)
        elif artifact.is_kvzap(record):
            fields, tensors = artifact.kvzap(record, tensors)
            config = HeadsConfig(**fields)
        else:
            config = HeadsConfig.from_dict(record)
        return cls.from_tensors(config, tensors, source=str(source))

    @classmethod
    def from_tensors(
        cls, config: HeadsConfig, tensors: Mapping[str, Tensor], source: str = "the given tensors"
    ) -> "RetainingHeads":
        """Heads of `config` with the given weights, such as `layers.{i}.fc{1,2}.weight`.
        ValueError: tensors missing, extra, misshapen or not finite; named."""
        if config.num_layers > len(tensors):  # building as many modules could take forever
            raise ValueError(
                f"heads from {source} do not fit their config: {len(tensors)} tensors for "
                f"{config.num_layers} layers"
            )
        with torch.device("meta"):
            heads = cls(config)
        expected = {name: tuple(p.shape) for name, p in heads.named_parameters()}
        artifact.check_tensors(tensors, expected, source)
        heads.load_state_dict(dict(tensors), assign=True, strict=True)
        return heads.requires_grad_(False)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `heads.safetensors`, `config.json` and a model card; all of them or none."""
        return artifact.save_folder(folder, self.config.to_dict(), self.state_dict())

    def save_released(self, path: str | Path) -> Path:
        """Write the released `.bin` format (weights only, the record is lost).

        Raises:
            ValueError: heads that the format has no names for.
        """
        if self.config.kind != "mlp" or self.config.bias:
            biases = " with biases" if self.config.bias else ""
            raise ValueError(
                f"the released format holds MLPs without biases, and these heads are of kind "
                f"{self.config.kind!r}{biases}; write a folder instead"
            )
        return artifact.save_released(path, self.state_dict())

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        revision: str | None = None,
    ) -> str:
        """Upload the artifact to the Hub in one commit; arguments are `locret.heads.hub.upload`'s.

        Returns:
            The repository's address.

        Raises:
            ValueError: these heads would not load again, or the Hub did not take them; says why.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.from_pretrained(self.save_pretrained(folder))
            files, _ = artifact.publishable(folder, repo_id)
            return hub.upload(repo_id, files, private=private, token=token, revision=revision)


def is_logarithm(label: str) -> bool:
    """Whether heads that learn this label predict logarithms of attention."""
    return label.startswith("log_")


def _head(config: HeadsConfig) -> RetainingHead:
    """The head of one layer."""
    read, width, heads = config.input_width, config.width, config.num_kv_heads
    head: RetainingHead
    if width is None:
        head = LinearHead(read, heads, config.bias)
    elif config.num_query_heads and config.sinks:
        head = GateHead(read, width, config.num_query_heads, heads, config.sinks)
    else:
        head = MLPHead(read, width, heads, config.activation, config.bias)
    if config.learns_logarithm:
        head.start_at(LOG_SCORE)
    return head


def _released_config(tensors: Mapping[str, Tensor]) -> HeadsConfig:
    """What the tensors of a released file say of their shapes."""
    num_layers = 1 + max(int(name.split(".")[1]) for name in tensors)
    fc1, fc2 = (tensors.get(f"layers.0.fc{i}.weight") for i in (1, 2))
    if fc1 is None or fc2 is None or fc1.dim() != 2 or fc2.dim() != 2:
        raise ValueError("released heads lack the fc1 or fc2 matrix of layer 0")
    return HeadsConfig(
        num_layers=num_layers,
        num_kv_heads=fc2.shape[0],
        input_width=fc1.shape[1],
        width=fc1.shape[0],
    )
