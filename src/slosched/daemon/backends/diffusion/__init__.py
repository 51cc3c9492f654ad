"""Text-to-image diffusion models, built from configs alone, that run in equal steps (stepped.py).

`designs.py` says what each model consists of, `building.py` makes its networks, `weights.py` fills them with
random numbers, `schedule.py` has the numbers of each step, `noise.py` the first latents, `judge.py` the judge
of a light model, and `model.py` runs them.
"""

from __future__ import annotations

from slosched.daemon.backends.diffusion.building import diffusion_specs as diffusion_specs
