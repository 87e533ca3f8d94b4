"""Sampling from a branch, and asking a branch what it thinks of another's samples."""
