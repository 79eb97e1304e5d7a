"""What a run shows at its end."""

import numpy as np

from attnlab.data.baselines import compressed_bits_per_byte
from attnlab.generation import SamplingParams, printable
from attnlab.inspect.curves import training_curve
from attnlab.inspect.figures import head_grid
from attnlab.models import TransformerConfig
from attnlab.runner.trained_model import TrainedModel
from attnlab.train.metrics import read_metrics


def language_model(trained: TrainedModel, prompt: str, *, max_new_tokens: int = 96) -> dict[str, float]:
    """A sample, its attention map, and the model's bits per byte beside those of two compressors.

    A model that reads whole texts has no sample, one without attention has no map; a prompt that fills the
    context is cut to half of it.
    """
    data = trained.experiment.data
    numbers = {"model": trained.metrics.get("bits_per_byte", float("nan"))}
    numbers |= compressed_bits_per_byte(data)
    values = ", ".join(f"{name} {value:.3f}" for name, value in numbers.items())
    limit = trained.experiment.train.eval_batches
    trained.log(
        f"bits per byte of the validation text: {values}" + (f" (model: of {limit} batches)" if limit else "")
    )

    _curve(trained, {name: numbers[name] for name in ("bz2", "xz")})
    start = trained.tokenizer.encode(prompt)[: data.sequence_length // 2]
    shown = [trained.tokenizer.eos_id, *start]
    if trained.experiment.model.causal:
        prompt, sampling = trained.tokenizer.decode(start), SamplingParams(temperature=0.8, top_p=0.95)
        (sample,) = trained.generate([prompt], max_new_tokens=max_new_tokens, sampling=sampling)
        trained.log(f"sample:\n{printable(prompt + sample.text)}")
        shown += sample.tokens
    shown = shown[: min(24, data.sequence_length)]
    if isinstance(trained.experiment.model, TransformerConfig):
        weights = trained.attention_of_tokens(shown)
        words = [trained.tokenizer.token_text(i) for i in shown]
        trained.save_figure(head_grid(np.asarray(weights), words, "What each token attends to"), "attention")
    return {f"bits_per_byte_{name}": value for name, value in numbers.items()}


def _curve(trained: TrainedModel, baselines: dict[str, float]) -> None:
    """Bits per byte over the run, from the metrics it has written."""
    file = trained.workdir / "metrics.jsonl"
    lines = [line for line in read_metrics(file) if "bits_per_byte" in line] if file.exists() else []

    def points(split: str) -> tuple[list[int], list[float]]:
        own = [line for line in lines if line["split"] == split]
        return [line["step"] for line in own], [line["bits_per_byte"] for line in own]

    (steps, values), (eval_steps, eval_values) = points("train"), points("eval")
    if len(steps) > 1:
        figure = training_curve(steps, values, eval_steps, eval_values, baselines, "bits per byte")
        trained.save_figure(figure, "curve")
