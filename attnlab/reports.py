"""What a run shows at its end."""

import numpy as np

from attnlab.data.baselines import compressed_bits_per_byte
from attnlab.generation.sampling import Sampling
from attnlab.inspect import pictures
from attnlab.trained import Trained


def language_model(trained: Trained, prompt: str, *, max_new_tokens: int = 96) -> dict[str, float]:
    """A sample, its attention map, and the model's bits per byte beside those of two compressors."""
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

    sampling = Sampling(temperature=0.8, top_p=0.95)
    (sample,) = trained.generate([prompt], max_new_tokens=max_new_tokens, sampling=sampling)
    trained.say(f"sample:\n{prompt}{sample.text}")

    shown = [trained.tokenizer.eos_id, *trained.tokenizer.encode(prompt), *sample.tokens][:24]
    weights = trained.attention_of(shown)
    words = [trained.tokenizer.token_text(i) for i in shown]
    trained.keep(pictures.head_grid(np.asarray(weights), words, "Where each token looks"), "attention")
    return {f"bits_per_byte_{name}": value for name, value in figures.items()}
