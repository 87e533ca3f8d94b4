"""From a row of a data set to a tokenised prompt: sources, a resumable sampler, prompts, the procedural mini suite."""
