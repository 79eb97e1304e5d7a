"""The command-line flags, defined where absl keeps them when this module is imported.

`run.py`, `python -m attnlab` and the console command `attnlab` share them.
"""

from absl import flags

from attnlab.runner.request import DEFAULT_EXPERIMENT, MODES, SamplingFlags

DEFAULTS = SamplingFlags()

flags.DEFINE_enum("mode", "train", MODES, "what to do")
flags.DEFINE_string("config", DEFAULT_EXPERIMENT, "experiment: path.py, path.py:argument or a config.json")
flags.DEFINE_string("workdir", None, "the run's folder; for train a new one under runs/ if not given")
flags.DEFINE_string("mesh", "single", "preset, or data:2,fsdp:2,tensor:2; a run keeps its own")

flags.DEFINE_integer("max_steps", None, "stop after this step")
flags.DEFINE_string("max_time", None, "stop after this time: 90 or 90s, 5m, 1h")
flags.DEFINE_integer("seed", None, "in place of the config's seed")
flags.DEFINE_bool("fast_dev_run", False, "go through every stage with a few steps only")
flags.DEFINE_integer("overfit_batches", None, "train on this many batches over and over")
flags.DEFINE_string("profile", None, "trace the steps start:stop, as in 10:13")
flags.DEFINE_bool("debug_nans", False, "stop at the operation that makes the first NaN")
flags.DEFINE_multi_string("sweep", [], "field and values, config.model.depth=2,4; several multiply")
flags.DEFINE_string(
    "checkpoint", "latest", "latest, best or a step; with train, of --init_from; with import, a folder"
)
flags.DEFINE_string("output_dir", None, "folder to write the exported checkpoint to")
flags.DEFINE_string("init_from", None, "workdir of another run whose parameters to start from")
flags.DEFINE_multi_string("init_rules", [], "regex->replacement that renames its parameters")
flags.DEFINE_multi_enum("tracker", [], ["wandb", "mlflow"], "wandb or mlflow, besides files")

flags.DEFINE_multi_string(
    "prompt", [], "text to go on from; of a model that reads one, such as a translator: the text to read"
)
flags.DEFINE_multi_string("source", [], "file of an image, or of a sound as WAV, for a model that reads one")
flags.DEFINE_integer("num_samples", DEFAULTS.num_samples, "samples of each prompt")
flags.DEFINE_integer("max_new_tokens", DEFAULTS.max_new_tokens, "longest sample, in tokens")
flags.DEFINE_float("temperature", DEFAULTS.temperature, "0 always takes the likeliest token")
flags.DEFINE_integer("top_k", None, "keep the k likeliest tokens")
flags.DEFINE_float("top_p", None, "keep the likeliest tokens up to this probability in all")
flags.DEFINE_float("min_p", None, "keep tokens at least this likely relative to the likeliest")
flags.DEFINE_integer("num_beams", None, "search for the likeliest texts with so many beams, and draw nothing")
flags.DEFINE_float("length_penalty", DEFAULTS.length_penalty, "of beams: over 0 prefers longer texts")
flags.DEFINE_string("draft_model", None, "speculative decoding: workdir or checkpoint of the draft model")
flags.DEFINE_integer(
    "prompt_lookup_ngram", None, "speculative decoding: draft from earlier matches of the last n tokens"
)
flags.DEFINE_integer(
    "num_speculative_tokens", DEFAULTS.num_speculative_tokens, "draft tokens verified in each forward pass"
)
flags.DEFINE_multi_string("stop", [], "text at which a sample ends")
