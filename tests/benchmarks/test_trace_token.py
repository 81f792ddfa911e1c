"""The files that a token passes are counted while the real engine runs."""

from benchmarks import trace_token

MOST = {"a chunk of a prompt": 17, "the first token of an answer": 10, "a token of an answer": 10}
"""Files that a reader has to follow; a change that needs one more should say why. Four of an
answer's are of the snapshot by which a stock call that fails is undone. One of a chunk's says what
linear modules are, which decoders whose layers are alike only call: weights may be in FP8."""


def test_what_a_token_passes():
    files = {name: {file for file, _ in passed} for name, passed in trace_token.traced().items()}
    prompt, answer = files["a chunk of a prompt"], files["a token of an answer"]
    assert {"engine/reading.py", "cache/layer.py", "heads/kinds.py"} <= prompt
    assert {"engine/attention.py", "cache/layer.py"} <= answer
    for name, most in MOST.items():
        assert len(files[name]) <= most, sorted(files[name])
