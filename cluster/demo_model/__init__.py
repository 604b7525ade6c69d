"""The demo models: a small Mixtral and a dense Mistral with tokenizer and chat template, trained by `train.py`."""

from pathlib import Path

DIRECTORY = Path(__file__).parent
DENSE_DIRECTORY = DIRECTORY / "dense"
