"""`python -m locret generate`: answer a prompt of any length within a budget."""

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from locret.cache_names import cache_of
from locret.commands.shared import BYTES_PER_MIB, Bar, add_model, load, load_heads
from locret.policies import POLICIES
from locret.quantities import parse_bytes
from locret.quantization import SCHEMES, Scheme, scheme_of


def add_to(commands: Any) -> None:
    command = commands.add_parser("generate", help="answer a prompt within a budget")
    add_model(command)
    command.add_argument("--prompt-file", required=True, help="a text file; - for standard input")
    command.add_argument("--policy", default=None, choices=sorted(POLICIES))
    command.add_argument(
        "--budget",
        type=_budget,
        default={},
        metavar="N",
        help="units a KV head keeps; a share of the prompt (0.25); memory (512MiB); or none",
    )
    auto = {"type": _setting, "default": "auto", "metavar": "N"}
    command.add_argument("--chunk-size", **auto, help="tokens read at a time, or none")
    command.add_argument("--stabilizers", **auto, help="last units that survive evictions")
    command.add_argument("--local-tokens", **auto, help="last tokens, read after the evictions")
    command.add_argument(
        "--query-aware", action="store_true", help="see the question before the final eviction"
    )
    command.add_argument("--quantization", choices=sorted(SCHEMES), help="of keys and values")
    command.add_argument("--bits", type=int, help="of the quantization")
    command.add_argument("--max-new-tokens", type=int, default=128)
    command.add_argument("--raw", action="store_true", help="do not apply the chat template")
    command.add_argument("--json", action="store_true", help="print one JSON object at the end")
    command.set_defaults(run=run)


def _budget(text: str) -> dict[str, Any]:
    """The engine's budget, by the name of its argument."""
    if text.lower() == "auto":
        return {}
    if text.lower() == "none":
        return {"budget": None}
    if text.isdigit():
        return {"budget": int(text)}
    share = re.fullmatch(r"0?\.\d+", text)
    return {"budget": float(text)} if share else {"budget_bytes": parse_bytes(text)}


def _setting(text: str) -> int | None | str:
    """An engine setting: a number, none, or auto (what the heads record, else the paper's)."""
    words: dict[str, str | None] = {"none": None, "auto": "auto"}
    return words[text.lower()] if text.lower() in words else int(text)


def run(given: argparse.Namespace) -> None:
    """Answer a prompt, and say what the cache took.

    Raises:
        ValueError: settings that cannot work together, or no text in the file.
    """
    from transformers import TextStreamer

    from locret.generation import Engine

    # What is cheap to get wrong is checked before a model is loaded.
    text = sys.stdin.read() if given.prompt_file == "-" else _read_text(given.prompt_file)
    if not text.strip():
        raise ValueError(f"there is no text in {given.prompt_file}; give a prompt")
    quantization = _quantization(given)
    heads = load_heads(given)
    loaded = load(given)
    engine = Engine(
        loaded.model,
        given.policy or ("locret" if heads else "full"),
        heads=heads,
        **given.budget,
        chunk_size=given.chunk_size,
        stabilizers=given.stabilizers,
        local_tokens=given.local_tokens,
        query_aware=given.query_aware,
        quantization=quantization,
        progress=Bar("reading"),
    )
    shown = TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = _prompt_ids(loaded.tokenizer, text, raw=given.raw).to(loaded.model.device)
    started = time.perf_counter()
    output = engine.generate(
        ids,
        max_new_tokens=given.max_new_tokens,
        streamer=None if given.json else shown,
        do_sample=False,
        return_dict_in_generate=True,
    )
    answer = output.sequences[0, ids.shape[1] :]
    result = {
        "answer": loaded.tokenizer.decode(answer, skip_special_tokens=True),
        "policy": engine.policy.name,
        "prompt_tokens": ids.shape[1],
        "new_tokens": len(answer),
        "seconds": round(time.perf_counter() - started, 3),
        "cache": cache_of(output).report(),
    }
    print(json.dumps(result) if given.json else _summary(result))


def _quantization(given: argparse.Namespace) -> Scheme | None:
    if given.quantization is None:
        if given.bits is not None:
            raise ValueError("--bits are of a --quantization; name one, such as kivi")
        return None
    options = {} if given.bits is None else {"bits": given.bits}
    return scheme_of({"name": given.quantization} | options)


def _summary(result: dict[str, Any]) -> str:
    report = result["cache"]
    return (
        f"\n[{result['policy']}: {result['prompt_tokens']} prompt tokens, {result['new_tokens']} "
        f"new ones, {result['seconds']:.1f} s; cache {report['total_bytes'] / BYTES_PER_MIB:.1f} "
        f"MiB, a full one {report['full_cache_bytes'] / BYTES_PER_MIB:.1f} MiB]"
    )


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def _prompt_ids(tokenizer: Any, text: str, raw: bool) -> Any:
    import torch

    if not raw and tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(text)["input_ids"]
    return torch.tensor([ids], dtype=torch.long)
