"""Data of our own making in the form of the benchmarks' files, and tiny artifacts to evaluate."""

import json
from pathlib import Path

from tests.tiny_models import tiny_heads, tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

NOUNS = [
    "otter",
    "lantern",
    "meadow",
    "kettle",
    "harbor",
    "violin",
    "walnut",
    "comet",
    "ferry",
    "goblet",
]
TRAITS = ["amber", "brave", "quiet", "rusty", "silver", "humble", "icy", "jolly", "lone", "mellow"]


def write_data(folder: Path) -> Path:
    """Files for RULER, FairytaleQA and L-Eval's tpo."""
    folder.mkdir(parents=True, exist_ok=True)
    stories = [
        {
            "id": f"story-{i}",
            "context": f"The {TRAITS[i]} {NOUNS[i]} sailed home at dusk. It sang a song. " * 3,
            "qa": [
                {"question": f"Who sailed home in {i}?", "answers": [f"the {NOUNS[i]}", "it"]},
                {"question": f"When in {i}?", "answers": ["at dusk"]},
            ],
        }
        for i in range(6)
    ]
    squad = [
        {
            "id": f"paragraph-{i}",
            "context": f"{noun} number {i} is {trait}.",
            "qa": [{"question": f"What is {noun}?", "answers": [trait, f"very {trait}"]}],
        }
        for i, (noun, trait) in enumerate(zip(NOUNS, TRAITS, strict=True))
    ]
    hotpot = [
        {
            "id": f"pair-{i}",
            "context": f"{NOUNS[i]}\nIt is {TRAITS[i]}.\n\n{NOUNS[i + 1]}\nIt is red.",
            "qa": [{"question": f"How is {NOUNS[i]}?", "answers": [TRAITS[i]]}],
        }
        for i in range(6)
    ]
    exam = [
        {
            "id": f"exam-{i}",
            "context": f"A lecture about the {NOUNS[i]}.",
            "qa": [{"question": "What about?\nA. sea\nB. it\nC. sky\nD. us", "answers": ["B"]}],
        }
        for i in range(3)
    ]
    for name, rows in {
        "fairytaleqa_val.jsonl": stories,
        "squad.jsonl": squad,
        "hotpotqa.jsonl": hotpot,
        "leval_tpo.jsonl": exam,
    }.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    prose = " ".join(f"The {trait} {noun} went on." for trait in TRAITS for noun in NOUNS)
    (folder / "prose.txt").write_text(prose)
    words = [f"{trait}{noun}" for trait in TRAITS for noun in NOUNS]
    (folder / "words.txt").write_text("\n".join(words))
    return folder


DATA = {
    "fairytaleqa": "fairytaleqa_val.jsonl",
    "squad": "squad.jsonl",
    "hotpotqa": "hotpotqa.jsonl",
    "haystack": "prose.txt",
    "words": "words.txt",
}


def write_artifacts(folder: Path) -> Path:
    """A tiny backbone with its tokenizer, heads for it, and query-aware ones."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=8192)
    model.save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    defaults = {"budget": 64, "chunk_size": 64, "stabilizers": 8, "local_tokens": 10}
    tiny_heads(model, defaults=defaults).save_pretrained(folder / "heads")
    aware = tiny_heads(model, defaults=defaults, query_tokens=8)
    aware.save_pretrained(folder / "aware")
    return folder
