"""Rollouts and teacher scores from SGLang servers, and the hand-over of weights to them (docs/sglang.md)."""
