"""Every policy keeps and answers what it did when heads stood in rectangles."""

import pytest

from tests.recorded import cases, recorded


@pytest.mark.parametrize("kv_heads", [2, 8], ids=["GQA", "MHA"])
def test_the_same_units_stay_and_the_same_tokens_come(kv_heads):
    expected = recorded()
    differing = [name for name, case in cases(kv_heads) if case != expected[name]]
    assert not differing, f"{len(differing)} cases, such as {differing[:3]}"
