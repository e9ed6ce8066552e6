"""Measuring: perplexity, benchmarks, and the matrix of what was kept."""
