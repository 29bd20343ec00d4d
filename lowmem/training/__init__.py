"""Training with less memory: a chunked loss, fewer and compressed activations, small optimizer states.

It may import ``quant``, ``kernels``, ``nn`` and ``transforms``. Begin with ``prepare_training.py``, which applies the
others to a model.
"""
