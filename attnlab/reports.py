"""What a run shows at its end."""

import numpy as np

from attnlab.data.baselines import compressed_bits_per_byte
from attnlab.generation.sampling import Sampling
from attnlab.inspect import pictures
from attnlab.trained import Trained


def language_model(trained: Trained, prompt: str, *, max_new_tokens: int = 96) -> dict[str, float]:
    """A sample, its attention map, and the model's bits per byte beside those of two compressors.

    A model that reads whole texts has no sample; a prompt that fills the context is cut to half of it.
    """
    data = trained.experiment.data
    figures = {
        "model": trained.session.evaluate(
            trained.params, data.eval_batches("validation", trained.tokenizer)
        ).get("bits_per_byte", float("nan"))
    }
    figures |= compressed_bits_per_byte(data)
    trained.say(
        "bits per byte of the validation text: " + ", ".join(f"{n} {v:.3f}" for n, v in figures.items())
    )

    start = trained.tokenizer.encode(prompt)[: data.sequence_length // 2]
    shown = [trained.tokenizer.eos_id, *start]
    if trained.experiment.model.causal:
        prompt, sampling = trained.tokenizer.decode(start), Sampling(temperature=0.8, top_p=0.95)
        (sample,) = trained.generate([prompt], max_new_tokens=max_new_tokens, sampling=sampling)
        trained.say(f"sample:\n{prompt}{sample.text}")
        shown += sample.tokens
    shown = shown[: min(24, data.sequence_length)]
    weights = trained.attention_of(shown)
    words = [trained.tokenizer.token_text(i) for i in shown]
    trained.keep(pictures.head_grid(np.asarray(weights), words, "Where each token looks"), "attention")
    return {f"bits_per_byte_{name}": value for name, value in figures.items()}
