"""Quantized storage of keys and values."""
