"""Two trained models that `slosched demo` serves, and questions whose answers are known.

`pitch.py` and `sentences.py` are what runs in a worker. The demo copies their text into a model repository, so
they import nothing of slosched. `folders.py` writes that repository, from weights that installed packages
carry; `tones.py` and `meanings.py` make questions and read answers, with numpy alone; `direct.py` is the
forward pass that served answers are compared with. The third model, of digits, is in
slosched.cascade.digits.classifier.
"""
