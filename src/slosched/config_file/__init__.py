"""TOML to configuration, and profiles back to TOML. tables.py has the rules that hold for every file."""

from slosched.config_file.daemons import load_controller_config, load_worker_config
from slosched.config_file.models import model_source
from slosched.config_file.profiles import (
    builtin_profiles,
    dump_profile,
    load_profile,
    write_profile,
)
from slosched.config_file.tables import with_table

__all__ = [
    "builtin_profiles",
    "dump_profile",
    "load_controller_config",
    "load_profile",
    "load_worker_config",
    "model_source",
    "with_table",
    "write_profile",
]
