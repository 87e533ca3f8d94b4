"""`python -m copd_megatron.rollout.sglang.serve …` is `python -m sglang.launch_server …`, with or without a GPU.

The processes that sglang spawns import this module again, and so get what it puts in place at import.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch

from copd_megatron.config.engines import KEY_VARIABLE, RUN_VARIABLE
from copd_megatron.rollout.sglang import stand_in
from copd_megatron.supervision.run_lock import die_with_parent, outlive_parent_for_workers

_SAVE_SECONDS = 1800.0
"""How long a server goes on serving at most when the run's conductor is gone."""

if not torch.cuda.is_available():
    stand_in.install()


def main(arguments: list[str]) -> None:
    """Serve until the process is ended, or its parent is; then until the run's branches have saved and ended."""
    if run := os.environ.get(RUN_VARIABLE):
        outlive_parent_for_workers(Path(run), _SAVE_SECONDS)
    else:
        die_with_parent()
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args

    # As an argument of the command the key would be there for everyone on the machine to read.
    if key := os.environ.pop(KEY_VARIABLE, None):
        arguments = [*arguments, "--api-key", key]
        _keep_out_of_logs(key)
    run_server(prepare_server_args(arguments))


def _keep_out_of_logs(key: str) -> None:
    """sglang logs all its settings when it starts."""
    make = logging.getLogRecordFactory()

    def redacted(*arguments: Any, **keywords: Any) -> logging.LogRecord:
        record = make(*arguments, **keywords)
        message = record.getMessage()
        if key in message:
            record.msg, record.args = message.replace(key, "…"), ()
        return record

    logging.setLogRecordFactory(redacted)


if __name__ == "__main__":
    main(sys.argv[1:])
