"""The command-line flags. Importing this module defines them in absl's `FLAGS`.

`run.py`, `python -m attnlab` and the console command `attnlab` share them.
"""

from absl import flags

from attnlab.runner.request import DEFAULT_EXPERIMENT, KV_CACHES, MODES, SamplingFlags

DEFAULTS = SamplingFlags()

flags.DEFINE_enum("mode", "train", MODES, "what to do; see the modes above")
flags.DEFINE_string(
    "config", DEFAULT_EXPERIMENT, "experiment: name, file.py, file.py:argument or config.json"
)
flags.DEFINE_string("workdir", None, "folder of the run; train and import create one under runs/ by default")
flags.DEFINE_string("mesh", "auto", "preset or sizes, data:2,fsdp:2,tensor:2; a saved run keeps its mesh")

flags.DEFINE_enum(
    "distributed", "auto", ("auto", "on", "off"), "run as one of several processes; auto asks the scheduler"
)
flags.DEFINE_string("coordinator", None, "address of process 0, HOST:PORT, without a scheduler")
flags.DEFINE_integer("num_processes", None, "number of processes, without a scheduler")
flags.DEFINE_integer("process_id", None, "index of this process, without a scheduler")
flags.DEFINE_string("startup_timeout", "5m", "time to wait for the other processes")
flags.DEFINE_string("watchdog", "30m", "end the job if a process makes no progress for this time")

flags.DEFINE_integer("max_steps", None, "stop after this step")
flags.DEFINE_string("max_time", None, "stop after this time: 90 (seconds), 90s, 5m or 1h")
flags.DEFINE_integer("seed", None, "seed of training, instead of config.seed, or of sampling")
flags.DEFINE_bool("fast_dev_run", False, "run every stage with only two steps")
flags.DEFINE_integer("overfit_batches", None, "train repeatedly on this many first batches")
flags.DEFINE_bool("allow_changed_data", False, "resume a run whose data or tokenizer has changed")
flags.DEFINE_string("profile", None, "record a profiler trace of steps start:stop, such as 10:13")
flags.DEFINE_string("dump_hlo", None, "folder for the programs that XLA compiles, before and after it")
flags.DEFINE_enum(
    "xla_flags", "none", ("none", "recommended"), "set the flags of XLA recommended for this accelerator"
)
flags.DEFINE_bool(
    "no_experiment_code",
    False,
    "do not run experiment files of saved runs; all their classes must be attnlab's",
)
flags.DEFINE_bool("debug_nans", False, "stop at the operation that produces the first NaN")
flags.DEFINE_multi_string("sweep", [], "field and values, config.model.depth=2,4; repeats form a grid")
flags.DEFINE_string(
    "checkpoint",
    "latest",
    "latest, best or a step; in train: of --init_from; in import: a folder or org/model",
)
flags.DEFINE_string("output_dir", None, "folder for the exported checkpoint")
flags.DEFINE_string("target", None, "describe for a TPU slice or GPUs that are not here: v5e:4x4, h100:8")
flags.DEFINE_string("init_from", None, "workdir of another run whose parameters initialize this one")
flags.DEFINE_multi_string("init_rules", [], "regex->replacement that renames parameters of --init_from")
flags.DEFINE_multi_enum("tracker", [], ["wandb", "mlflow"], "also log metrics to wandb or mlflow")

flags.DEFINE_multi_string("prompt", [], "text to continue, or the input text of a sequence-to-sequence model")
flags.DEFINE_multi_string("source", [], "image file or WAV file, the input of an image or audio model")
flags.DEFINE_integer("num_samples", DEFAULTS.num_samples, "number of samples per prompt")
flags.DEFINE_integer("max_new_tokens", DEFAULTS.max_new_tokens, "maximum length of a sample, in tokens")
flags.DEFINE_float("temperature", DEFAULTS.temperature, "sampling temperature; 0 is greedy decoding")
flags.DEFINE_integer("top_k", None, "keep the k most probable tokens")
flags.DEFINE_float("top_p", None, "keep the most probable tokens up to this total probability")
flags.DEFINE_float("min_p", None, "exclude tokens below this fraction of the highest probability")
flags.DEFINE_integer("num_beams", None, "beam search with this many beams, instead of sampling")
flags.DEFINE_float("length_penalty", DEFAULTS.length_penalty, "beam search: above 0 favours longer texts")
flags.DEFINE_string("draft_model", None, "speculative decoding: workdir or checkpoint of the draft model")
flags.DEFINE_integer(
    "prompt_lookup_ngram", None, "speculative decoding: draft from earlier matches of the last n tokens"
)
flags.DEFINE_integer(
    "num_speculative_tokens", DEFAULTS.num_speculative_tokens, "draft tokens verified in each forward pass"
)
flags.DEFINE_enum(
    "kv_cache", DEFAULTS.kv_cache, KV_CACHES, "KV cache: all keys, those in a window, in pages, or in 8 bits"
)
flags.DEFINE_multi_string("stop", [], "stop generation at this text")
