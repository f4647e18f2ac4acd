"""The embedded model: a small Mamba that was trained to do the paper's task among others, and what made it.

This directory is itself the checkpoint, in the layout that `transformers` loads. `tokenizer.py` cuts text into tokens,
`wordings.py` has the sentences, `corpus.py` draws the training documents from them, `model.py` has the sizes, `train.py`
trains and writes the model, `measure.py` measures it and `card.py` says so.
"""

from pathlib import Path

DIRECTORY = Path(__file__).parent
"""Where config.json, model.safetensors and tokenizer.json are."""
