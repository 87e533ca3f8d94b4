"""The run description: YAML in, frozen and checked objects out."""

from copd_megatron.config.load import load_config, save_config
from copd_megatron.config.run import RunConfig

__all__ = ["RunConfig", "load_config", "save_config"]
