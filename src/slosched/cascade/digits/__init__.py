"""A small cascade whose scores are live and whose quality is measured: diffusion of scikit-learn's digits.

The heavy program is a class-conditional diffusion model of 8x8 digits, the light one a network that was
distilled from it into a single step, with a judge. All of them are trained here, on a CPU, within minutes
(training.py), and their weights come with the package. docs/digits.md says what came of it.

models.py is what a worker serves, and needs torch and safetensors; training and measuring need scikit-learn
too.
"""
