"""Language model without attention: an LSTM on the Python documentation.

Claim: trained for a few minutes on a laptop, an LSTM predicts documentation of modules outside the
  training split in fewer than 2.45 bits per byte.
Source: Zaremba et al. 2014 (arXiv 1409.2329, section 3), made small.
Command: python run.py --config=recurrent_lm
Time: 62 seconds on 2 CPU cores.
Result: 2.34 bits per byte (one seed).
"""

from attnlab.data import BPE, Text
from attnlab.layers import LSTMConfig
from attnlab.models import RecurrentConfig
from attnlab.runner import reports
from attnlab.runner.trained_model import TrainedModel
from attnlab.train import Experiment, Muon, Train, WarmupStableDecay


def get_config() -> Experiment:
    """Return two layers of 256 units, with the text and the tokenizer of lm_docs."""
    return Experiment(
        model=RecurrentConfig(depth=2, width=256, cell=LSTMConfig()),
        data=Text(name="stdlib_docs", tokenizer=BPE(vocab_size=4096), sequence_length=64, batch_size=32),
        optimizer=Muon(learning_rate=5e-3, schedule=WarmupStableDecay(warmup=20, decay=0.4)),
        train=Train(steps=280, eval_every=140, checkpoint_every=140),
    )


def report(trained: TrainedModel) -> dict[str, float]:
    """Report a sample, and bits per byte beside two compressors."""
    numbers = reports.language_model(trained, prompt="Return the")
    trained.claim("bits per byte", numbers["bits_per_byte_model"], "<", 2.45)
    return numbers
