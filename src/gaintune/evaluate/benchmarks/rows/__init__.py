"""Benchmarks from local rows: which columns a task reads, where rows may lie, and lm-eval's own task over them."""
