"""The Open Inference Protocol by HTTP."""
