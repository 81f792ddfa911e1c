"""From text to training batches: sources of conversations, their tokens, a data module."""
