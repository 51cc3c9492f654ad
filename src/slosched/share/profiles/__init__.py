"""Solo profiles: how long each model takes alone on a device, for virtual time. The TOML files are the data."""
