"""Labels from the attention logits of an unmodified model, taken inside its eager attention."""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask


def stock_prompt_labels(model, input_ids, prompt_length):
    """[layers, H, P]: the largest logit every prompt unit gets from the answer's tokens."""
    labels = []

    def spying_eager(
        module, query, key, value, attention_mask, scaling, softcap=None, s_aux=None, **kwargs
    ):
        group = module.num_key_value_groups
        keys = key.repeat_interleave(group, dim=1)
        values = value.repeat_interleave(group, dim=1)
        logits = query @ keys.transpose(2, 3) * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        seen = logits[0, :, prompt_length:, :prompt_length].amax(dim=1)
        labels.append(seen.reshape(key.shape[1], group, -1).amax(dim=1))
        logits = logits + attention_mask
        if s_aux is not None:
            sinks = s_aux[None, :, None, None].expand(*logits.shape[:-1], 1)
            logits = torch.cat([logits, sinks], dim=-1)
        weights = logits.softmax(dim=-1)[..., : keys.shape[2]]
        return (weights @ values).transpose(1, 2).contiguous(), None

    AttentionInterface.register("spying_eager", spying_eager)
    AttentionMaskInterface.register("spying_eager", eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("spying_eager")
    try:
        with torch.no_grad():
            model(input_ids=input_ids, use_cache=False)
    finally:
        model.set_attn_implementation(before)
    return torch.stack(labels)
