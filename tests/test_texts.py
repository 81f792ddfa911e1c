"""Texts of many kinds are functions of their seed, and about as long as they should be."""

import ast
import csv
import io
import json
import re
from random import Random

import pytest

from locret.tasks.texts import TEXTS


@pytest.mark.parametrize("kind", TEXTS)
def test_a_text_follows_from_its_seed_and_has_about_the_length(kind):
    make = TEXTS[kind]
    for seed in range(3):
        text = make(Random(seed), 500)
        assert text == make(Random(seed), 500) != make(Random(seed + 1), 500)
        assert 400 < len(text) < 5000
        assert len(make(Random(seed), 2000)) > 2 * len(text)
        assert text == text.strip() and "{" + "item" not in text


@pytest.mark.parametrize("seed", range(5))
def test_tables_and_records_can_be_read(seed):
    sign = re.search(r"[,;\t]", TEXTS["csv"](Random(seed), 300)).group()
    rows = list(csv.reader(io.StringIO(TEXTS["csv"](Random(seed), 300)), delimiter=sign))
    assert rows[0][0] == "id" and {len(row) for row in rows} == {len(rows[0])}
    lines = TEXTS["markdown_table"](Random(seed), 300).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    records = re.split(r"\n(?=\{)", TEXTS["json"](Random(seed), 300))
    assert all("id" in json.loads(record) for record in records) and len(records) > 2


def test_repeated_words_are_told_apart_from_rare_ones():
    for seed in range(5):
        words = re.findall(r"[a-z]{3,}", TEXTS["repeated_words"](Random(seed), 3000))
        counts = sorted((words.count(word) for word in set(words)), reverse=True)
        assert counts[0] > 5 * counts[len(counts) // 2]


def test_code_is_python():
    found = 0
    for seed in range(5):
        text = TEXTS["code"](Random(seed), 4000)
        try:
            found += len(ast.parse(text[: text.rindex("\ndef ")]).body) > 0
        except (SyntaxError, ValueError):  # cut within a definition
            continue
    assert found


def test_mixed_texts_have_several_kinds():
    assert all(TEXTS["mixed"](Random(seed), 1000).count("## ") >= 2 for seed in range(5))
