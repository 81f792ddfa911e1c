"""Speed and memory, one JSON a run: `python -m benchmarks.NAME --help`.

Commands: `longcontext`, `ragged`, `training`, `serving` and every other file that has a `main`; the
other files are what these share.
"""
