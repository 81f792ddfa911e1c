"""The model card of a heads artifact: what it is for, how to use it, what it was trained on."""

from collections.abc import Mapping
from typing import Any

_CARD = """---
library_name: locret
tags: [locret, kv-cache, long-context]
{base_model}---

# Retaining heads for {backbone}

Trained retaining heads ([Locret](https://arxiv.org/abs/2410.01805)) for a frozen {backbone}: they
say of every KV-cache unit how much later tokens will need it, so that long prompts are read in a
bounded cache.

```python
import locret
heads = locret.RetainingHeads.from_pretrained("path/or/hub-id")
engine = locret.Engine(model, heads=heads, budget={budget})
ids = engine.generate(input_ids)
```

| | |
|---|---|
{table}
"""


def model_card(record: Mapping[str, Any]) -> str:
    """Markdown with the Hub's front matter, from the fields of `HeadsConfig`."""
    backbone: str | None = record.get("backbone")
    rows = {key: record[key] for key in record if key not in ("metrics", "defaults")}
    rows.update({f"default {key}": value for key, value in record.get("defaults", {}).items()})
    rows.update({f"metric {key}": value for key, value in record.get("metrics", {}).items()})
    is_hub_id = backbone is not None and ":" not in backbone and backbone.count("/") == 1
    return _CARD.format(
        backbone=backbone or "a backbone that is not recorded",
        base_model=f"base_model: {backbone}\n" if is_hub_id else "",
        budget=record.get("defaults", {}).get("budget", 16384),
        table="\n".join(f"| {key} | {value} |" for key, value in sorted(rows.items())),
    )
