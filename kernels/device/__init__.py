"""Triton code: one program per row of logits, every row read in tiles of `launch.BLOCK` columns."""
