"""Measuring what a compressed cache still knows: tasks, scores and the runs that combine them."""
