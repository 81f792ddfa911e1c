"""Speed and memory, one JSON a run. Each file is a command: `python -m benchmarks.NAME --help`."""
