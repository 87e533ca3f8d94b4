"""What every test relies on: one thread per process, nothing compiled, nothing fetched, the same examples each time.

Triton's kernels run in its interpreter, which has to be chosen before anybody imports Triton."""

from __future__ import annotations

import os

# Read once, when torch, transformers and their libraries are first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")
