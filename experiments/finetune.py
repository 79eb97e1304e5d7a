"""Fine-tune a pretrained checkpoint on the Python documentation.

Claim: on documentation of modules outside the training split, the loss after fine-tuning is below
  the checkpoint's.
Source: GPT (Radford et al. 2018), which trains a pretrained decoder on with a small learning rate.
Command: python run.py --config=finetune --config.init=DIR (a folder in Hugging Face's layout, or a
  hub id)
  To train low-rank adapters alone, add --config.lora=LoRA --config.optimizer.learning_rate=1e-3
Time: depends on the checkpoint.
Result: holds for a small checkpoint; no large one was tried.
"""

from attnlab.data import Text
from attnlab.models import DecoderConfig
from attnlab.pretrained import load
from attnlab.runner import reports
from attnlab.runner.trained_model import TrainedModel
from attnlab.train import AdamW, Cosine, Experiment, Train


def get_config() -> Experiment:
    """Return an experiment whose model and tokenizer come from the checkpoint `init`."""
    return Experiment(
        init="",
        model=DecoderConfig(),
        data=Text(name="stdlib_docs", sequence_length=256, batch_size=8),
        optimizer=AdamW(learning_rate=2e-5, schedule=Cosine(warmup=20)),
        train=Train(steps=200, eval_every=100, checkpoint_every=100),
    )


def report(trained: TrainedModel) -> dict[str, float]:
    """Report loss and bits per byte beside the checkpoint's and two compressors', and a sample."""
    before = load(trained.experiment.init, trained.session.mesh, trained.experiment.model.dtypes).params
    batches = trained.batches("validation", trained.experiment.train.eval_batches)
    loss = trained.session.evaluate(before, batches)["loss"]
    trained.log(f"loss before: {loss:.3f} nats per token, after: {trained.metrics['loss']:.3f}")
    trained.claim("loss below the checkpoint's", trained.metrics["loss"], "<", loss)
    return reports.language_model(trained, prompt="Return the") | {"loss_before": loss}
