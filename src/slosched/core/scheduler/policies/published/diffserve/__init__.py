"""DiffServe (MLSys'25), which serves cascades of two diffusion models, and what it is compared with."""
