"""One table per model family: which Hugging Face tensors make which Megatron parameter."""
