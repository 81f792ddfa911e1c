"""`python -m locret generate`: answer a prompt of any length within a budget."""

import argparse
import json
import time
from typing import Any

from locret.commands import shared
from locret.commands.progress import Answering, Progress
from locret.model.hooks import cache_of


def add_to(commands: Any) -> None:
    command = commands.add_parser("generate", help="answer a prompt within a budget")
    shared.add_model(command)
    command.add_argument("--prompt-file", required=True, help="a text file; - for standard input")
    shared.add_engine(command)
    command.add_argument(
        "--query-aware", action="store_true", help="see the question before the final eviction"
    )
    command.add_argument("--max-new-tokens", type=shared.whole(1), default=128)
    command.add_argument("--raw", action="store_true", help="do not apply the chat template")
    command.add_argument("--json", action="store_true", help="print one JSON object at the end")
    command.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    """Answer a prompt, and say what the cache took."""
    from transformers import TextStreamer

    # What is cheap to get wrong is checked before a model is loaded.
    text = shared.read_text(given.prompt_file)
    if not text.strip():
        raise ValueError(f"there is no text in {given.prompt_file}; give a prompt")
    checked = shared.checked_engine(given, query_aware=given.query_aware)
    engine, tokenizer = shared.make_engine(given, checked, not given.raw)
    shown = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    counted = Answering(given.max_new_tokens)
    ids = _prompt_ids(tokenizer, text, raw=given.raw).to(engine.model.device)
    started = time.perf_counter()
    with Progress("reading", "tokens") as engine.progress:
        output = engine.generate(
            ids,
            ids.new_ones(ids.shape),  # every token counts, the padding token too
            max_new_tokens=given.max_new_tokens,
            streamer=counted if given.json else shown,
            do_sample=False,
            return_dict_in_generate=True,
        )
    answer = output.sequences[0, ids.shape[1] :]
    result = {
        "answer": tokenizer.decode(answer, skip_special_tokens=True),
        "policy": engine.policy.name,
        "chunk_size": engine.config.reading.chunk,
        "prompt_tokens": ids.shape[1],
        "new_tokens": len(answer),
        "seconds": round(time.perf_counter() - started, 3),
        "cache": cache_of(output).report(),
    }
    print(json.dumps(result) if given.json else _summary(result))


def _summary(result: dict[str, Any]) -> str:
    report, heads = result["cache"], ""
    fewest, most = report["least_units"], report["most_units"]
    if fewest != most:  # some hold more than others in their layer
        mean = sum(report["units"]) / len(report["units"])
        heads = f"heads hold {mean:,.0f} units on average, {min(fewest):,} to {max(most):,}; "
    own, full = (
        report[name] / shared.BYTES_PER_MIB for name in ("total_bytes", "full_cache_bytes")
    )
    return (
        f"\n[{result['policy']}: {result['prompt_tokens']} prompt tokens, {result['new_tokens']} "
        f"new ones, {result['seconds']:.1f} s; {heads}cache "
        f"{own:.1f} MiB with room for a longer answer, a full one {full:.1f} MiB]"
    )


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
