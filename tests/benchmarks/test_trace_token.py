"""The files that a token passes are counted while the real engine runs."""

from benchmarks import trace_token


def test_what_a_token_passes():
    passed = trace_token.traced()
    files = {name: {file for file, _ in found} for name, found in passed.items()}
    prompt, answer = files["a chunk of a prompt"], files["a token of an answer"]
    assert {"engine/attention.py", "cache/layer.py", "heads/heads.py"} <= prompt
    assert {"engine/attention.py", "cache/layer.py"} <= answer
