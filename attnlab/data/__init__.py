"""Data sets, tokenizers, and the input pipeline that packs documents into batches."""

from attnlab.data.base import Data
from attnlab.data.batch import Batch, Example
from attnlab.data.text import Text
from attnlab.data.tokenizer import BPE, Bytes, Tokenizer, Words

__all__ = ["BPE", "Batch", "Bytes", "Data", "Example", "Text", "Tokenizer", "Words"]
