"""Reports: the numbers and figures that an experiment writes at the end of a run."""

import numpy as np

from attnlab.data.baselines import compressed_bits_per_byte
from attnlab.generation import SamplingParams, printable
from attnlab.models import TransformerConfig
from attnlab.runner.trained_model import TrainedModel
from attnlab.train.metrics import read_metrics


def language_model(trained: TrainedModel, prompt: str, *, max_new_tokens: int = 96) -> dict[str, float]:
    """Report bits per byte against two compressors, a sample, and its attention map.

    A bidirectional model has no sample, and a model without attention has no attention map. The
    prompt is truncated to half of the context.

    Args:
        trained: the trained model.
        prompt: the text to continue.
        max_new_tokens: the maximum length of the sample.

    Returns:
        `bits_per_byte_model`, `bits_per_byte_bz2` and `bits_per_byte_xz`.
    """
    data = trained.experiment.data
    numbers = {"model": trained.metrics.get("bits_per_byte", float("nan"))}
    numbers |= compressed_bits_per_byte(data)
    values = ", ".join(f"{name} {value:.3f}" for name, value in numbers.items())
    limit = trained.experiment.train.eval_batches
    trained.log(
        f"bits per byte of the validation text: {values}" + (f" (model: {limit} batches)" if limit else "")
    )

    _save_training_curve(trained, {name: numbers[name] for name in ("bz2", "xz")})
    prompt_ids = trained.tokenizer.encode(prompt)[: data.sequence_length // 2]
    tokens = [trained.tokenizer.eos_id, *prompt_ids]
    if trained.experiment.model.causal:
        prompt, sampling = trained.tokenizer.decode(prompt_ids), SamplingParams(temperature=0.8, top_p=0.95)
        (sample,) = trained.generate([prompt], max_new_tokens=max_new_tokens, sampling=sampling)
        trained.log(f"sample:\n{printable(prompt + sample.text)}")
        tokens += sample.tokens
    tokens = tokens[: min(24, data.sequence_length)]
    if isinstance(trained.experiment.model, TransformerConfig):
        from attnlab.inspect.figures import head_grid  # here, since matplotlib takes a second to import

        weights = trained.attention_of_tokens(tokens)
        words = [trained.tokenizer.token_text(i) for i in tokens]
        trained.save_figure(
            head_grid(np.asarray(weights), words, "Attention weights of each head"), "attention"
        )
    return {f"bits_per_byte_{name}": value for name, value in numbers.items()}


def _save_training_curve(trained: TrainedModel, baselines: dict[str, float]) -> None:
    """Save a figure of bits per byte by step, from the metrics that the run has written."""
    from attnlab.inspect.curves import training_curve

    file = trained.workdir / "metrics.jsonl"
    lines = [line for line in read_metrics(file) if "bits_per_byte" in line] if file.exists() else []

    def points(split: str) -> tuple[list[int], list[float]]:
        selected = [line for line in lines if line["split"] == split]
        return [line["step"] for line in selected], [line["bits_per_byte"] for line in selected]

    (steps, values), (eval_steps, eval_values) = points("train"), points("eval")
    if len(steps) > 1:
        figure = training_curve(steps, values, eval_steps, eval_values, baselines, "bits per byte")
        trained.save_figure(figure, "curve")
