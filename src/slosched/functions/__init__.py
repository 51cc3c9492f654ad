"""Functions: what runs on the same workers as models. The state that calls share is in `functions.state`."""
