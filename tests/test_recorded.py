"""Every policy keeps and answers what it did when heads stood in rectangles."""

import pytest

from tests.recorded import COMPOSED, cases, recorded


def differs(name):
    """Whether a case may be another one now."""
    policy, setting, _ = name.split(maxsplit=1)[1].split(", ")
    # Blocks of keys that share a scale held padding where heads held different numbers of units.
    return policy in COMPOSED and setting == "kivi"


@pytest.mark.parametrize("kv_heads", [2, 8], ids=["GQA", "MHA"])
def test_the_same_units_stay_and_the_same_tokens_come(kv_heads):
    expected = recorded()
    differing = [
        name for name, case in cases(kv_heads) if case != expected[name] and not differs(name)
    ]
    assert not differing, f"{len(differing)} cases, such as {differing[:3]}"
