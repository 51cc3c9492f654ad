"""A folder of models as NAME/VERSION, looked at by a process of its own while the worker runs."""
