"""Train retaining heads in one forward of the frozen backbone (paper section 3.2).

The backbone reads prompt + answer once, and every layer's loss and gradients are taken on the way
(`locret.training.row_loss`).

Several conversations may stand in one row (`locret.training.segments`): projections and MLPs run
over the whole row, attention and labels segment by segment, so that no mask is needed and no token
sees a stranger. A conversation may go on from its context in several ways that do not see each
other, its branches. A row that does not fit in memory is read in chunks
(`locret.training.chunked`).
"""

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from locret.heads.heads import FEATURES, RetainingHeads
from locret.heads.targets import LABELS, BoundaryLoss, Loss, by_name, make_loss
from locret.model.backbone import Backbone
from locret.training.chunked import ChunkedRowLoss
from locret.training.row_loss import Distilled, Features, PromptKeys, Recipe, RowLoss, Share
from locret.training.segments import Segment, check_segments


class Distillation:
    """Loss of retaining heads on prompt + answer sequences.

    Args:
        backbone: frozen; its parameters get no gradients and keep their mode.
        heads: what is trained; their config says what they read and which label they learn.
        alpha: weight of the smoothness loss (paper: 0.0025).
        loss: a name of `locret.heads.targets.LOSSES`, or a loss; `boundary_weight` is that of
            `BoundaryLoss`.
        keep_scores: also return predictions and targets of every layer.
        prompt_keys: "rotated" as they should be; "unrotated" is how the released Phi-3 recipe lets
            the answer meet the prompt's keys when it takes its labels. It reproduces those labels,
            and is of no other use.
        chunk_size: tokens that a layer reads at a time; None reads a row at once. Losses and
            gradients are the same up to rounding.

    Raises:
        ValueError: heads that do not fit the backbone, an unknown label or loss, a chunk size
            below 1 or with unrotated keys.
    """

    def __init__(
        self,
        backbone: Backbone,
        heads: RetainingHeads,
        *,
        alpha: float = 0.0025,
        loss: str | Loss = "smooth_l1",
        boundary_weight: float = 0.2,
        keep_scores: bool = False,
        prompt_keys: PromptKeys = "rotated",
        chunk_size: int | None = None,
    ) -> None:
        if prompt_keys not in get_args(PromptKeys):
            raise ValueError(f"prompt_keys is {prompt_keys!r}; expected 'rotated' or 'unrotated'")
        if chunk_size is not None and (chunk_size < 1 or prompt_keys == "unrotated"):
            raise ValueError(
                f"chunk_size is {chunk_size} with prompt_keys {prompt_keys!r}; expected at least 1 "
                "and rotated keys, or None"
            )
        differences = heads.config.differences(backbone.geometry)
        if differences:
            raise ValueError(f"heads do not fit the backbone: {'; '.join(differences)}")
        self.backbone = backbone
        self.heads = heads
        self.chunk_size = chunk_size
        self.recipe = Recipe(
            heads=heads,
            features=FEATURES[heads.config.tap],
            label=by_name(LABELS, heads.config.label, "label"),
            loss=make_loss(loss, boundary_weight) if isinstance(loss, str) else loss,
            alpha=alpha,
            backend=backbone.backend,
            keep_scores=keep_scores,
            prompt_keys=prompt_keys,
        )

    def __call__(
        self,
        input_ids: Tensor,
        segments: Sequence[Segment],
        share: Share | None = None,
        features: Features | None = None,
    ) -> Distilled:
        """One row of samples.

        Args:
            input_ids: [1, N] long; for one segment also [B, N].
            segments: the samples in the row, in order, without gaps.
            share: what becomes of each layer's gradients once they are taken.
            features: what heads read, instead of this row's own features, such as those of
                `locret.training.evicted_features`; the list is empty of tensors afterwards.

        Raises:
            ValueError: segments that do not fill the row, answers or branches that are not where
                they can be, or branches with unrotated keys.
        """
        length = input_ids.shape[1]
        check_segments(segments, length)
        if self.recipe.prompt_keys == "unrotated" and any(each.branches for each in segments):
            raise ValueError("prompt_keys is 'unrotated', which samples with branches do not take")
        given = self.recipe, segments, share, features
        if self.chunk_size is None or length <= self.chunk_size:
            row = RowLoss(*given)
        else:
            row = ChunkedRowLoss(*given, chunk_size=self.chunk_size)
        decoder = self.backbone.decoder
        with torch.no_grad(), row.reading(decoder), self.backbone.attached(row.layer):
            decoder(
                input_ids=input_ids,
                position_ids=torch.arange(length, device=input_ids.device)[None],
                use_cache=False,
            )
        if isinstance(self.recipe.loss, BoundaryLoss):
            self.recipe.loss.end_row()
        return row.result()
