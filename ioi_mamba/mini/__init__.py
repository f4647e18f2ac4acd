"""The embedded model: a small Mamba that was trained to do the paper's task, and what made it.

This directory is itself the checkpoint, in the layout that `transformers` loads. `tokenizer.py` cuts text
into tokens, `corpus.py` draws the training documents, `train.py` trains, measures and writes the model.
"""
