"""Merging models of one base into one, slice by slice: `recipe` says how, `methods` computes, `folders` does it."""
