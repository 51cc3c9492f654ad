"""The models of the published sharing experiments that can be captured as CUDA graphs, with random weights.

`originals/bert`, `originals/gpt`, `originals/gpt2` and `originals/whisper` have the shapes of
bert-large-uncased, GPT-J-6B, GPT-2 and whisper-small. A generated token is a step (stepped.py). Stable
Diffusion XL is `diffusion/sdxl`.
"""

from slosched.daemon.backends.originals.building import originals_specs

__all__ = ["originals_specs"]
