"""Weights on disk: Hugging Face folders, their names and layout in Megatron, conversion and merging."""
