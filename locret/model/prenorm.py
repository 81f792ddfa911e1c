"""A decoder whose layers are alike, run with fused kernels between the model's own matrix products.

Such a layer is x += attention(RMSNorm(x)), then x += down(activation(gate(n)) * up(n)) of n =
RMSNorm(x). Its linear modules are called, whatever they are (`locret.model.linear`); the modules
around them are passed over, so that they must be those of transformers as they are.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from locret.kernels import HeadNorms, NewUnit, add_norm
from locret.kernels.dense import ACTIVATIONS, add_norm_reference
from locret.model.backbone import PRENORM, Backbone
from locret.model.hooks import (
    Enough,
    LayerCall,
    LayerFunction,
    autocasts,
    without_autocast,
    without_compiling,
)
from locret.model.linear import called, called_gated, called_gated_halves, is_plain, runs_more

Attend = Callable[[int, Tensor, "PrenormLayer"], Tensor]
"""Given a layer's index, its normalised input [B, T, hidden size] and the layer: store the new
units and attend, [B, T, H*G, D]."""

HEAD_NORMS = "q_norm", "k_norm"

_CPU_TOKENS = 512
"""That an MLP takes at a time on a CPU, whose caches what is between its products shall fit."""


class Norm(NamedTuple):
    """RMSNorm: its weight [size] and what is added to the mean of the squares."""

    weight: Tensor
    eps: float

    @classmethod
    def of(cls, module: Any) -> "Norm":
        return cls(module.weight.contiguous(), module.variance_epsilon)

    def added(self, residual: Tensor, new: Tensor | None) -> tuple[Tensor, Tensor]:
        """`add_norm`, of any dtypes: those of projections that were wrapped may differ."""
        alike = {x.dtype for x in (residual, new, self.weight) if x is not None}
        return (add_norm if len(alike) == 1 else add_norm_reference)(residual, new, *self)


class PrenormLayer:
    """A layer's modules by their roles.

    Attributes:
        norms: before attention and before the MLP.
        head_norms: of queries and keys; None if there are none.
        scaling: softmax scale.
    """

    def __init__(self, layer: Any, activation: str) -> None:
        self._attention = attention = without_compiling(layer.self_attn)
        self._mlp: Any = layer.mlp
        self._activation = activation
        self.norms = Norm.of(layer.input_layernorm), Norm.of(layer.post_attention_layernorm)
        self.head_norms: HeadNorms | None = None
        if hasattr(attention, "q_norm"):
            query, key = Norm.of(attention.q_norm), Norm.of(attention.k_norm)
            self.head_norms = HeadNorms(query.weight, key.weight, query.eps)
        self.scaling: float = attention.scaling

    def project(self, x: Tensor) -> NewUnit:
        """Query, key and value [B, heads, T, D] of x [B, T, hidden size]."""
        attention = self._attention
        if hasattr(attention, "qkv_proj"):
            of_keys = attention.num_key_value_heads * attention.head_dim
            (both,) = called(x, attention.qkv_proj)
            flat = both.split([both.shape[-1] - 2 * of_keys, of_keys, of_keys], -1)
        else:
            flat = called(x, attention.q_proj, attention.k_proj, attention.v_proj)
        heads = (each.unflatten(-1, (-1, attention.head_dim)) for each in flat)
        return NewUnit(*(each.transpose(1, 2) for each in heads))

    def heads(self, x: Tensor) -> NewUnit:
        """`project`, and norms of queries and keys."""
        new = self.project(x)
        if self.head_norms is None:
            return new
        of_query, of_key, eps = self.head_norms
        query, key = (
            Norm(weight, eps).added(each.transpose(1, 2).contiguous(), None)[1].transpose(1, 2)
            for each, weight in ((new.query, of_query), (new.key, of_key))
        )
        return NewUnit(query, key, new.value)

    def output(self, attended: Tensor) -> Tensor:
        """[B, T, hidden size] of attended heads [B, T, H*G, D]."""
        return called(attended.flatten(2), self._attention.o_proj)[0].contiguous()

    def mlp(self, x: Tensor) -> Tensor:
        """[B, T, hidden size] of x [B, T, hidden size]."""
        if x.device.type != "cpu" or x.shape[:2].numel() <= _CPU_TOKENS:
            return self._mlp_of(x)
        # Hooks of linear modules may tell rows apart. Else all are one, of which pieces are
        # contiguous: PyTorch multiplies others slowly where weights are frozen.
        one = all(is_plain(each, x) for each in self._mlp.children() if hasattr(each, "weight"))
        rows = x.reshape(1, -1, x.shape[-1]) if one else x
        some = rows.split(max(1, _CPU_TOKENS // len(rows)), dim=1)
        return torch.cat([self._mlp_of(each) for each in some], dim=1).view(x.shape)

    def _mlp_of(self, x: Tensor) -> Tensor:
        return called(self._gated(x), self._mlp.down_proj)[0].contiguous()

    def _gated(self, x: Tensor) -> Tensor:
        """activation(gate) * up, [B, T, intermediate size]."""
        if hasattr(self._mlp, "gate_up_proj"):
            return called_gated_halves(x, self._mlp.gate_up_proj, self._activation)
        return called_gated(x, self._mlp.gate_proj, self._mlp.up_proj, self._activation)


class PrenormDecoder:
    """A model's forward without gradients, of tokens or whole chunks.

    Args:
        backbone: one of which `why_not_fused` says nothing.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._decoder = decoder = backbone.decoder
        self._head = backbone.model.get_output_embeddings()
        activation = backbone.geometry.activation
        self._layers = [PrenormLayer(without_compiling(x), activation) for x in decoder.layers]
        self._norm = Norm.of(decoder.norm)

    def logits(self, ids: Tensor, attend: Attend, last: int = 0) -> Tensor:
        """[B, n, vocabulary] for the last n of ids [B, T], all of them by default."""
        return self._head(self.hidden(ids, attend)[:, -last:])

    def hidden(self, ids: Tensor, attend: Attend) -> Tensor:
        """The decoder's output [B, T, hidden size] for ids [B, T]."""
        stream, x = self._decoder.embed_tokens(ids).contiguous(), None
        # One name for what is between two sums: chunks are large, and none stays longer than used.
        for i, layer in enumerate(self._layers):
            stream, x = layer.norms[0].added(stream, x)
            x = layer.output(attend(i, x, layer))
            stream, x = layer.norms[1].added(stream, x)
            x = layer.mlp(x)
        return self._norm.added(stream, x)[1]


class Reading(NamedTuple):
    """How `read_whole` read a text.

    Attributes:
        hidden: the decoder's output [B, T, hidden size]; None where nobody asked for it.
        why_not_fused: None = by a `PrenormDecoder`; else why by the model's own forward.
    """

    hidden: Tensor | None
    why_not_fused: str | None


@torch.no_grad()
def read_whole(
    backbone: Backbone, ids: Tensor, run: LayerFunction, *, wanted: bool = True, stock: str = ""
) -> Reading:
    """Read texts without a cache.

    Args:
        backbone: attached to `run`.
        ids: [B, T] long.
        run: the layer function.
        wanted: the decoder's output is. Else fused kernels stop when the last layer has attended.
        stock: why the model's own forward has to read them; empty = it need not.
    """
    device, last = ids.device, len(backbone.layers) - 1
    why = stock or why_not_whole(backbone, device)
    if why is not None:
        at = torch.arange(ids.shape[1], device=device)[None]
        read = backbone.decoder(input_ids=ids, position_ids=at, use_cache=False)
        return Reading(read.last_hidden_state if wanted else None, why)
    mixed = autocasts(device)

    def layer(call: LayerCall) -> Tensor:
        with torch.autocast(device.type) if mixed else contextlib.nullcontext():
            attended = run(call)
        if call.layer_idx == last and not wanted:
            raise Enough
        return attended

    with without_autocast(device), contextlib.suppress(Enough):
        return Reading(PrenormDecoder(backbone).hidden(ids, attend_by(layer, backbone)), None)
    return Reading(None, None)


def attend_by(run: LayerFunction, backbone: Backbone, cache: Any = None) -> Attend:
    """What computes one layer's attention after the other, by a layer function."""

    def attend(i: int, x: Tensor, layer: PrenormLayer) -> Tensor:
        return run(backbone.layers[i].call(x, layer.heads(x), layer.scaling, cache))

    return attend


def why_not_whole(backbone: Backbone, device: torch.device) -> str | None:
    """As `why_not_fused`, for `read_whole`. Autocast to the dtype of the weights changes none of
    their products, so that it is no reason."""
    weight = getattr(backbone.decoder.embed_tokens, "weight", None)
    dtype = torch.get_autocast_dtype(device.type) if autocasts(device) else None
    harmless = weight is not None and weight.dtype == dtype
    with without_autocast(device) if harmless else contextlib.nullcontext():
        return why_not_fused(backbone)


def why_not_fused(backbone: Backbone, dtype: torch.dtype | None = None) -> str | None:
    """Why a `PrenormDecoder` cannot stand in for the model's forward; None if it can.

    Args:
        dtype: of the keys and values stored, by steps; None = that of the model.
    """
    kind, geometry = backbone.config.model_type, backbone.geometry
    if kind not in PRENORM or not backbone.plain:
        return f"nothing is fused for {kind!r}"
    if autocasts(backbone.layers[0].device):
        return "autocast chooses the dtype of each product"
    if geometry.activation not in ACTIVATIONS:
        return f"no kernel knows the activation {geometry.activation!r}"
    if backbone.rotary.pattern is None or backbone.rotary.pattern.pairing != "half":
        return "no kernel knows its rotation"
    runs = map(without_compiling, backbone.decoder.layers[: backbone.config.num_hidden_layers])
    if [without_compiling(x.self_attn) for x in runs] != [x.module for x in backbone.layers]:
        return "its attention layers are others than before"
    passed = [*_passed_over(backbone)]
    file = f"transformers.models.{kind}.modeling_{kind}"
    others = type(ACT2FN[geometry.activation]), nn.Dropout
    for module in passed:
        own = type(module)
        stock = own.__module__ == file and own.forward.__module__ == file
        if not (stock or own in others) or runs_more(module):
            return f"its {own.__name__} was changed, or has hooks"
        if module.training:
            return "the model is in training mode"
    for attention in (layer.module for layer in backbone.layers):
        norms = [getattr(attention, x) for x in HEAD_NORMS if hasattr(attention, x)]
        if len({norm.variance_epsilon for norm in norms}) > 1:
            return "queries and keys are normalised with different eps"
    if not hasattr(backbone.decoder.embed_tokens, "weight"):
        return "nobody knows the dtype of its embedding"
    weights = [module.weight for module in passed if hasattr(module, "weight")]
    dtypes = {weight.dtype for weight in (*weights, backbone.decoder.embed_tokens.weight)}
    fits = len(dtypes) == 1 and dtype in (None, *dtypes)
    return None if fits else f"it computes in {dtypes} and stores {dtype}"


def _passed_over(backbone: Backbone) -> Iterator[Any]:
    """The modules that a `PrenormDecoder` does not call. Those of them with weights are norms."""
    decoder = backbone.decoder
    yield from (backbone.model, decoder, decoder.norm, decoder.rotary_emb)
    for layer in map(without_compiling, decoder.layers):
        attention = without_compiling(layer.self_attn)
        yield from (layer, layer.input_layernorm, attention)
        yield from (layer.post_attention_layernorm, layer.mlp)
        yield from (getattr(attention, x) for x in HEAD_NORMS if hasattr(attention, x))
        dropouts = "resid_attn_dropout", "resid_mlp_dropout"  # of Phi-3
        yield from (getattr(layer, x) for x in dropouts if hasattr(layer, x))
        yield getattr(layer.mlp, "act_fn", getattr(layer.mlp, "activation_fn", layer.mlp))
