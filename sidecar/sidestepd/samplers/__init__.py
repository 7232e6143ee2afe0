"""What is read of the machine beside the training, by a process of its own: one file per kind of source.

`names.py` holds every name, NAMES.md explains them. A new sampler is one file and one line in `__main__.py`.
"""
