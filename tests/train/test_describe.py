"""The description of an experiment, and a check that every config field has an effect."""

import dataclasses
import inspect
import re
from functools import cache

import jax
import numpy as np
import pytest

from attnlab import config as configs
from attnlab.config.types import choices, element_types, fields_of, is_tuple, members
from attnlab.data.builtin import glyphs
from attnlab.layers import AttentionConfig
from attnlab.layers.contrastive_loss import SiglipLoss
from attnlab.models import (
    CaptionerConfig,
    ContrastiveConfig,
    DecoderConfig,
    GenerationDefaults,
    RecurrentSeq2SeqConfig,
    Seq2SeqConfig,
    SpeechEncoderConfig,
    VisionLanguageConfig,
    ViTConfig,
)
from attnlab.models.contrastive import TextTowerConfig
from attnlab.models.resampler import ResamplerConfig
from attnlab.train.describe import describe
from attnlab.train.experiment import Experiment
from attnlab.train.session import Session
from attnlab.train.step import init_params, make_eval_step, make_train_step
from experiments.recurrent_translate import Sentences
from tests.data.toys import Images, Sounds
from tests.programs import ROOT, write_text
from tests.train.small import TOKENIZER, make_experiment, make_session


def test_describe_lists_every_parameter_with_its_sharding():
    session = make_session(make_experiment(), "fsdp:4,tensor:2")
    text = describe(session)
    sections = dict(part.split("\n", 1) for part in text.split("\n\n"))
    assert list(sections) == [
        *("mesh", "parameters", "FLOPs per token", "bytes per device", "batch", "attention"),
    ]
    assert "fsdp:4,tensor:2" in sections["mesh"]
    lines = sections["parameters"].splitlines()
    assert len(lines) == len(jax.tree.leaves(session.abstract_state.params)) + 1
    (row,) = [line.split("  ") for line in lines if "attention/query/kernel" in line]
    row = [cell.strip() for cell in row if cell]
    assert row == ["layers/periods/block0/attention/query/kernel", "(2, 16, 4, 4)", "float32", "P(-, 'fsdp', 'tensor', -)", "512"]  # fmt: skip
    count = sum(x.size for x in jax.tree.leaves(session.abstract_state.params))
    assert lines[-1].split()[-1] == f"{count:,}"
    counted = session.experiment.model.token_flops(257, 16)
    assert f"{counted.training:,.0f}" in sections["FLOPs per token"]
    assert re.search(r"activations and temporaries +[\d.,]+ [KM]iB", sections["bytes per device"])
    assert "(8, 16)" in sections["batch"]
    row = ["layers/periods/block0/attention", "Causal()", "16", "x", "16", "blockwise"]
    assert sections["attention"].split() == row


# Every field has an effect ------------------------------------------------------------------------

DEFAULT = configs.load(str(ROOT / "experiments" / "lm_docs.py")).config

# Another valid value of each field of the default experiment, and the representation that must
# differ: the lowered text of the training "step", the model's "forward" pass alone, the initial
# "state", or the "batches".
CHANGES = {
    "model": ("EncoderConfig", "step"),
    "model.depth": ("3", "step"),
    "model.width": ("128", "step"),
    "model.attention.heads": ("4", "step"),
    "model.attention.kv_heads": ("2", "step"),
    "model.attention.head_dim": ("16", "step"),
    "model.attention.bias": ("true", "step"),
    "model.attention.qk_norm": ("true", "step"),
    "model.attention.softcap": ("20.0", "step"),
    "model.attention.scale": ("0.1", "step"),
    "model.attention.sinks": ("true", "step"),
    "model.attention.dropout": ("0.1", "step"),
    "model.feed_forward": ("MLP", "step"),
    "model.feed_forward.width": ("64", "step"),
    "model.feed_forward.activation": ("relu", "step"),
    "model.feed_forward.bias": ("true", "step"),
    "model.norm": ("LayerNorm", "step"),
    "model.norm.epsilon": ("0.01", "step"),
    "model.norm.zero_centered_scale": ("true", "step"),
    "model.placement": ("post", "step"),
    "model.layer_scale": ("0.1", "step"),
    "model.positions": ("NoPositions", "step"),
    "model.positions.theta": ("500.0", "step"),
    "model.positions.fraction": ("0.5", "step"),
    "model.positions.scaling": ("LinearScaling(2.0)", "step"),
    "model.positions.interleaved": ("true", "step"),
    "model.pattern": ("(Sliding(window=4),)", "step"),
    "model.pattern.0.positions": ("NoPositions", "step"),
    "model.pattern.0.scale": ("0.5", "step"),
    "model.pattern.0.score": ("Softcap(5.0)", "step"),
    "model.pattern.0.normalizer": ("SoftmaxOne", "step"),
    "model.pattern.0.mixer": ("GatedOutput", "step"),
    "model.vocab_size": ("5000", "step"),
    "model.tied": ("false", "step"),
    "model.embedding_norm": ("true", "step"),
    "model.scale_readout": ("true", "step"),
    "model.readout_bias": ("true", "step"),
    "model.scale_embedding": ("true", "step"),
    "model.logit_softcap": ("30.0", "step"),
    "model.dropout": ("0.1", "step"),
    "model.init": ("MuP", "step"),
    "model.init.std": ("0.1", "state"),
    "model.dtypes.param": ("bfloat16", "step"),
    "model.dtypes.compute": ("bfloat16", "step"),
    "model.dtypes.logits": ("bfloat16", "step"),
    "model.dtypes.products": ("int8", "step"),
    "model.remat": ("full", "step"),
    "model.scan": ("false", "step"),
    "model.unrolled": ("true", "step"),
    "data.tokenizer": ("Bytes", "batches"),
    "data.tokenizer.vocab_size": ("257", "batches"),
    "data.sequence_length": ("32", "batches"),
    "data.batch_size": ("4", "batches"),
    "data.name": ("text:{other}", "batches"),
    "optimizer": ("Lion", "step"),
    "optimizer.learning_rate": ("0.5", "step"),
    "optimizer.schedule": ("Constant", "step"),
    "optimizer.schedule.warmup": ("7", "step"),
    "optimizer.schedule.decay": ("0.9", "step"),
    "optimizer.schedule.final": ("0.5", "step"),
    "optimizer.weight_decay": ("0.5", "step"),
    "optimizer.clip_norm": ("0.25", "step"),
    "optimizer.rules": ("()", "step"),
    "optimizer.rules.0.pattern": ("bias$|kernel$", "step"),
    "optimizer.rules.0.learning_rate": ("0.5", "step"),
    "optimizer.rules.0.weight_decay": ("0.5", "step"),
    "optimizer.momentum": ("0.5", "step"),
    "optimizer.newton_schulz_steps": ("3", "step"),
    "optimizer.b1": ("0.5", "step"),
    "optimizer.b2": ("0.5", "step"),
    "loss.label_smoothing": ("0.1", "step"),
    "loss.z_loss": ("0.1", "step"),
    "train.steps": ("77", "step"),  # affects the schedule
    "train.microbatches": ("2", "step"),
    "train.ema": ("0.9", "step"),
    "train.spike_skip": ("SpikeSkip", "step"),
    "lora": ("LoRA", "step"),
    "seed": ("1", "state"),
}
PAIRS = ",".join(["1.0"] * 4)  # one factor per rotated pair of head dimensions
OTHER_PAIRS = f"(2.0,{PAIRS[4:]})"
LONG_ROPE = f"model.positions.scaling=LongRoPE(({PAIRS}),({PAIRS}),64,4.0)"
# The same for components that the default experiment does not use: keys are (override that selects
# the component, field).
COMPONENT_CHANGES = {
    ("model.feed_forward=MLP", "width"): ("64", "step"),
    ("model.feed_forward=MLP", "activation"): ("relu", "step"),
    ("model.feed_forward=MLP", "bias"): ("true", "step"),
    ("model.feed_forward=Experts", "experts"): ("4", "step"),
    ("model.feed_forward=Experts", "top_k"): ("3", "step"),
    ("model.feed_forward=Experts", "width"): ("64", "step"),
    ("model.feed_forward=Experts", "activation"): ("clamped_swiglu", "step"),
    ("model.feed_forward=Experts", "bias"): ("true", "step"),
    ("model.feed_forward=Experts", "renormalize"): ("false", "step"),
    ("model.feed_forward=Experts", "balance_loss_weight"): ("0.5", "step"),
    ("model=EncoderConfig", "pattern"): ("(Bidirectional(4,4),)", "step"),
    ("model=EncoderConfig", "head"): ("Classifier", "step"),
    ("model=EncoderConfig", "token_types"): ("2", "step"),
    ("model=EncoderConfig", "embedding_width"): ("32", "step"),
    ("model=EncoderConfig", "num_param_groups"): ("1", "step"),
    ("model=EncoderConfig", "skip_first_attention_norm"): ("true", "step"),
    ("model=EncoderConfig(head=MaskedLM())", "head.dense"): ("none", "step"),
    ("model=EncoderConfig(head=MaskedLM())", "head.tied"): ("false", "step"),
    ("model=EncoderConfig(head=MaskedLM())", "head.bias"): ("false", "step"),
    ("model=EncoderConfig(head=Classifier())", "head.labels"): ("3", "step"),
    ("model=EncoderConfig(head=Classifier())", "head.pooling"): ("none", "step"),
    ("model=EncoderConfig(head=Classifier())", "head.dense"): ("none", "step"),
    ("model=EncoderConfig(head=Classifier())", "head.dropout"): ("0.1", "step"),
    ("model=EncoderConfig(head=Pooled())", "head.pooling"): ("MeanOfTokens", "forward"),
    ("model=EncoderConfig(head=Pooled())", "head.dense"): ("none", "forward"),
    ("model=EncoderConfig(head=Classifier())", "head.dense.activation"): ("relu", "step"),
    ("model=EncoderConfig(head=Classifier())", "head.dense.bias"): ("false", "step"),
    ("model=EncoderConfig(head=Classifier())", "head.dense.norm"): ("true", "step"),
    ("model=RecurrentConfig", "depth"): ("3", "step"),
    ("model=RecurrentConfig", "width"): ("128", "step"),
    ("model=RecurrentConfig", "cell"): ("GRU", "step"),
    ("model=RecurrentConfig", "cell.forget_bias"): ("0.0", "step"),
    ("model=RecurrentConfig", "vocab_size"): ("5000", "step"),
    ("model=RecurrentConfig", "tied"): ("false", "step"),
    ("model=RecurrentConfig", "dropout"): ("0.1", "step"),
    ("model=RecurrentConfig", "std"): ("0.5", "state"),
    ("model=RecurrentConfig", "remat"): ("full", "step"),
    ("model=RecurrentConfig", "scan"): ("false", "step"),
    ("model.norm=LayerNorm", "epsilon"): ("0.01", "step"),
    ("model.norm=LayerNorm", "bias"): ("false", "step"),
    ("model.remat=Save", "query"): ("device", "step"),
    ("model.remat=Save", "key"): ("device", "step"),
    ("model.remat=Save", "value"): ("device", "step"),
    ("model.remat=Save", "attention_out"): ("device", "step"),
    ("model.remat=Save", "mlp_hidden"): ("device", "step"),
    ("model.remat=Save", "branch_out"): ("device", "step"),
    ("model.positions=Learned(1024)", "length"): ("512", "step"),
    ("model.positions=Learned(1024)", "offset"): ("2", "step"),
    ("model.positions=Sinusoidal()", "halves"): ("true", "step"),
    ("model.positions=RelativeBias()", "buckets"): ("8", "step"),
    ("model.positions=RelativeBias()", "max_distance"): ("20", "step"),
    ("model.positions.scaling=LinearScaling(2.0)", "factor"): ("4.0", "step"),
    ("model.positions.scaling=NTK(2.0)", "factor"): ("4.0", "step"),
    ("model.positions.scaling=DynamicNTK(2.0,64)", "factor"): ("4.0", "step"),
    ("model.positions.scaling=DynamicNTK(2.0,64)", "original"): ("128", "step"),
    ("model.positions.scaling=YaRN(4.0,4096)", "factor"): ("2.0", "step"),
    ("model.positions.scaling=YaRN(4.0,4096)", "original"): ("1024", "step"),
    ("model.positions.scaling=YaRN(4.0,4096)", "fast"): ("4.0", "step"),
    ("model.positions.scaling=YaRN(4.0,4096)", "slow"): ("8.0", "step"),
    ("model.positions.scaling=YaRN(4.0,4096)", "truncate"): ("false", "step"),
    ("model.positions.scaling=YaRN(4.0,4096)", "temperature"): ("1.5", "step"),
    (LONG_ROPE, "short"): (OTHER_PAIRS, "step"),
    (LONG_ROPE, "long"): (OTHER_PAIRS, "step"),
    (LONG_ROPE, "original"): ("128", "step"),
    (LONG_ROPE, "temperature"): ("1.5", "step"),
    (LONG_ROPE, "factor"): ("2.0", "step"),
    ("model.positions.scaling=Llama3()", "factor"): ("2.0", "step"),
    ("model.positions.scaling=Llama3()", "original"): ("64", "step"),
    ("model.positions.scaling=Llama3()", "slow"): ("2.0", "step"),
    ("model.positions.scaling=Llama3()", "fast"): ("8.0", "step"),
    ("model.init=MuP", "base_width"): ("32", "step"),
    ("model.init=MuP", "base_head_dim"): ("16", "step"),
    ("model.pattern.0=Sliding", "window"): ("4", "step"),
    ("model.pattern.0=Sliding", "positions"): ("NoPositions", "step"),
    ("model.pattern.0.score=Softcap", "cap"): ("5.0", "step"),
    ("model.pattern.0.score=Temperature", "length"): ("4", "state"),
    ("model.pattern.0.score=T5Bias", "buckets"): ("8", "step"),
    ("model.pattern.0.score=T5Bias(buckets=4)", "max_distance"): ("8", "step"),
    ("model.pattern.0.score=Shaw", "max_distance"): ("4", "step"),
    ("model.pattern.0.score=CoPE", "positions"): ("8", "step"),
    ("model.pattern.0.score=FoX", "bias"): ("0.5", "state"),
    ("model.pattern.0.normalizer=Sigmoid", "length"): ("16", "step"),
    ("model.pattern.0.normalizer=TopK", "k"): ("4", "step"),
    ("model.pattern.0.mixer=GatedOutput", "gates"): ("head", "step"),
    ("model.pattern.0.mixer=Differential", "init"): ("0.5", "step"),
    ("model.pattern.0=Bidirectional", "left"): ("4", "step"),
    ("model.pattern.0=Bidirectional", "right"): ("4", "step"),
    ("model.pattern.0=Bidirectional", "positions"): ("NoPositions", "step"),
    ("optimizer=AdamW", "b1"): ("0.5", "step"),
    ("optimizer=AdamW", "b2"): ("0.5", "step"),
    ("optimizer=AdamW", "epsilon"): ("0.001", "step"),
    ("optimizer=Lion", "learning_rate"): ("0.5", "step"),
    ("optimizer=Lion", "b1"): ("0.5", "step"),
    ("optimizer=Lion", "b2"): ("0.5", "step"),
    ("optimizer=Adafactor", "learning_rate"): ("0.5", "step"),
    ("optimizer=Adafactor", "decay_rate"): ("0.5", "step"),
    ("optimizer=Adafactor", "momentum"): ("0.5", "step"),
    ("optimizer=Adafactor", "min_dim_size_to_factor"): ("8", "step"),
    ("optimizer=SGD", "learning_rate"): ("0.5", "step"),
    ("optimizer=SGD", "momentum"): ("0.5", "step"),
    ("optimizer=SGD", "nesterov"): ("true", "step"),
    ("optimizer=ScheduleFree", "schedule"): ("Cosine", "step"),
    ("optimizer=ScheduleFree", "interpolation"): ("0.5", "step"),
    ("optimizer=ScheduleFree", "b2"): ("0.5", "step"),
    ("optimizer=ScheduleFree", "epsilon"): ("0.001", "step"),
    ("optimizer.schedule=Constant", "warmup"): ("7", "step"),
    ("optimizer.schedule=Cosine", "warmup"): ("7", "step"),
    ("optimizer.schedule=Cosine", "final"): ("0.5", "step"),
    ("optimizer.schedule=InverseSquareRoot", "warmup"): ("7", "step"),
    ("lora=LoRA", "rank"): ("4", "step"),
    ("lora=LoRA", "alpha"): ("4.0", "step"),
    ("lora=LoRA", "rule"): ("query", "step"),
    ("lora=LoRA", "full"): ("norm", "step"),
    ("train.spike_skip=SpikeSkip", "sigmas"): ("3.0", "step"),
    ("train.spike_skip=SpikeSkip", "window"): ("16", "step"),
}
# The same for models with a source input, each with its own experiment.
SOURCE_EXPERIMENTS = {
    "images": (
        Experiment(
            model=ViTConfig(
                depth=2, width=16, attention=AttentionConfig(4), image=(8, 8, 3), patch=(4, 4), registers=1
            ),
            data=Images(batch_size=8),
        ),
        {
            "model.image": "(8, 12, 3)",
            "model.patch": "(2, 4)",
            "model.patch_bias": "false",
            "model.class_tokens": "2",
            "model.registers": "2",
            "model.mask_token": "true",
            "model.embedding_norm": "true",
            "model.antialias": "true",
            "model.pooling": "Probe",
            "model.pooling.dense": "true",
            "model.classes": "300",
            "model.norm": "RMSNorm",
            "model.pattern": "(Bidirectional(4,4),)",
        },
    ),
    "recurrent": (
        Experiment(model=RecurrentSeq2SeqConfig(depth=2, width=16), data=Sentences(batch_size=8)),
        {"model.attention": "Dot", "model.attention.width": "8", "model.bidirectional": "false"},
    ),
}
SOURCE_EXPERIMENTS["images and texts"] = (
    Experiment(
        model=ContrastiveConfig(
            image=dataclasses.replace(SOURCE_EXPERIMENTS["images"][0].model, classes=0),
            text=TextTowerConfig(depth=2, width=16, attention=AttentionConfig(4)),
            width=16,
            objective=SiglipLoss(),
        ),
        data=Images(batch_size=8, sequence_length=3),
    ),
    {
        "model.text.pooling": "EndOfText(5)",
        "model.text.positions": "Sinusoidal",
        "model.text.norm": "RMSNorm",
        "model.width": "24",
        "model.image_projection": "none",
        "model.text_projection": "none",
        "model.text_projection.bias": "true",
        "model.objective": "ClipLoss",
        "model.objective.init_logit_scale": "1.0",
        "model.objective.init_logit_bias": "-2.0",
    },
)
SOURCE_EXPERIMENTS["images and texts, other parts"] = (
    configs.override_all(
        SOURCE_EXPERIMENTS["images and texts"][0],
        [("model.objective", "ClipLoss"), ("model.text.pooling", "EndOfText(5)")],
    ),
    {"model.objective.init_logit_scale": "1.0", "model.text.pooling.token": "6"},
)
SOURCE_EXPERIMENTS["audio"] = (
    Experiment(
        model=Seq2SeqConfig(
            SpeechEncoderConfig(depth=1, width=16, attention=AttentionConfig(4), mels=4, frames=8),
            DecoderConfig(depth=1, width=16, attention=AttentionConfig(4)),
        ),
        data=Sounds(batch_size=8),
    ),
    {
        "model.encoder.frames": "10",
        "model.encoder.norm": "RMSNorm",
        "model.encoder.pattern": "(Bidirectional(4,4),)",
    },
)
IMAGE_TO_TEXT = {
    "encoder": dataclasses.replace(SOURCE_EXPERIMENTS["images"][0].model, classes=0),
    "decoder": DecoderConfig(depth=2, width=16, attention=AttentionConfig(4)),
}
SOURCE_EXPERIMENTS["images, captioned"] = (
    Experiment(
        model=CaptionerConfig(**IMAGE_TO_TEXT, resampler=ResamplerConfig(4, 1)),
        data=Images(batch_size=8, sequence_length=3, image=(8, 8, 3)),
    ),
    {
        "model.resampler": "none",
        "model.resampler.latents": "5",
        "model.resampler.depth": "2",
        "model.projection": "true",
        "model.cross": "GatedCrossAttention",
    },
)
SOURCE_EXPERIMENTS["images before a text"] = (
    Experiment(
        model=VisionLanguageConfig(**IMAGE_TO_TEXT), data=SOURCE_EXPERIMENTS["images, captioned"][0].data
    ),
    {
        "model.projector.activation": "relu",
        "model.projector.bias": "false",
        "model.encoder_final_norm": "false",
        "model.image_token_id": "5",
        "model.bidirectional_prompt": "true",
    },
)
SOURCE_FIELDS = [(name, field) for name, (_, fields) in SOURCE_EXPERIMENTS.items() for field in fields]
# Fields of components that the default experiment does not use, with the reason or test file.
COMPONENT_FIELDS_TESTED_ELSEWHERE = {
    **{
        ("model.pattern.0.mixer=LatentAttention", name): "needs as many key heads: tests/layers/test_specs.py"
        for name in ("rank", "rotary_dim", "query_rank")
    },
    (
        "model=Seq2SeqConfig(SpeechEncoderConfig())",
        "encoder.mels",
    ): "must equal that of the data: tests/models/test_speech.py",
    ("model=Seq2SeqConfig", "encoder"): "a different model: tests/models/test_seq2seq.py",
    ("model=Seq2SeqConfig", "shared_embedding"): "removes a table: tests/models/test_seq2seq.py",
    (
        "model=VisionLanguageConfig",
        "prompt_suffix",
    ): "affects generation: tests/pretrained/test_vision_language.py",
    **{
        (
            "model=Seq2SeqConfig",
            f"generation.{name}",
        ): "affects generation: tests/generation/test_source_inputs.py"
        for name in (f.name for f in dataclasses.fields(GenerationDefaults))
    },
    **{
        (f"data={glyphs.Glyphs.__name__}", name): "as for all data: tests/data/test_base.py"
        for name in ("tokenizer", "sequence_length")
    },
}
FIELDS_TESTED_ELSEWHERE = {
    "data": "other data sets belong to other experiments: test_run.py",
    "init": "replaces parameters and model: tests/test_import.py",
    "model.pattern.0.cross_attends": "selects cross-attention layers: tests/models/test_resampler.py",
    "data.prefetch": "prepares the same batches earlier; tested with the data",
    **dict.fromkeys(
        (
            *("train.log_every", "train.eval_every"),
            *("train.checkpoint_every", "train.checkpoint_minutes"),
        ),
        "used by the loop: test_loop.py",
    ),
    "train.eval_batches": "used by the runner: test_run.py",
    "train.keep": "used by checkpoints: test_checkpoints.py",
}


def declared(cls, name):
    """Return the class that declares a field, possibly a base class of `cls`."""
    return next(parent for parent in cls.__mro__ if name in inspect.get_annotations(parent))


def components(annotation):
    """Return the classes of the library that a field may hold, directly or in a tuple."""
    parts = [p for m in members(annotation) for p in (element_types(m, 1) or () if is_tuple(m) else [m])]
    classes = [c for part in parts for c in choices(part).values()]
    return [c for c in classes if c.__module__.startswith("attnlab.")]


def every_field(cls, visited=()):
    """Yield (declaring class, field) for `cls` and all components in it.

    Fields that always hold the same component class are omitted.
    """
    for name, annotation in fields_of(cls).items():
        inner = components(annotation)
        if len(inner) != 1 or type(None) in members(annotation):
            yield declared(cls, name), name
        for component in inner:
            if component not in visited:
                yield from every_field(component, (*visited, component))


def at(config, path):
    """Return the value at a dotted path."""
    for name in path.split("."):
        config = config[int(name)] if name.isdecimal() else getattr(config, name)
    return config


def test_tables_contain_every_field():
    tested = set()
    for path in (*CHANGES, *FIELDS_TESTED_ELSEWHERE):
        holder, _, name = f".{path}".rpartition(".")
        tested.add((declared(type(at(DEFAULT, holder[1:]) if holder else DEFAULT), name), name))
    for choice, name in (*COMPONENT_CHANGES, *COMPONENT_FIELDS_TESTED_ELSEWHERE):
        path, _, component = choice.partition("=")
        holder, _, name = f"{path}.{name}".rpartition(".")
        tested.add((declared(type(at(configs.override(DEFAULT, path, component), holder)), name), name))
    for source, path in SOURCE_FIELDS:
        holder, _, name = path.rpartition(".")
        tested.add((declared(type(at(SOURCE_EXPERIMENTS[source][0], holder)), name), name))
    assert set(every_field(Experiment)) - tested == set()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return a small default experiment on a temporary text, and the path of another text."""
    folder = tmp_path_factory.mktemp("texts")
    text, other = write_text(folder / "a.txt"), write_text(folder / "b.txt", seed=1)
    small = [
        *(("model.width", "64"), ("model.depth", "2"), ("data.sequence_length", "16"), ("data.batch_size", "8")),
        *(("data.name", f"text:{text}"), ("data.tokenizer.vocab_size", "300")),
    ]  # fmt: skip
    return configs.override_all(DEFAULT, small), other


def step_text(e):
    session = Session(e, make_session(e).mesh, TOKENIZER)
    with jax.set_mesh(session.mesh):
        step = make_train_step(session.model, e, session.optimizer)
        return jax.jit(step).lower(session.abstract_state, session.abstract_batch).as_text()


def evaluation_text(e):
    """Lower the model and its loss, a part of the training step."""
    session = Session(e, make_session(e).mesh, TOKENIZER)
    with jax.set_mesh(session.mesh):
        return (
            jax.jit(make_eval_step(session.model))
            .lower(session.abstract_params, session.abstract_batch)
            .as_text()
        )


def init_and_evaluation_text(e):
    """Lower parameter initialization, the model and its loss as one program."""
    session = Session(e, make_session(e).mesh, TOKENIZER)

    def run(batch):
        key = jax.random.key(e.seed)
        return session.model.init_with_output(key, targets=batch.targets, **batch.inputs, method="loss_terms")

    with jax.set_mesh(session.mesh):
        return jax.jit(run).lower(session.abstract_batch).as_text()


def initial_params(e):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(make_session(e).new_params())])


def programs(e):
    """Lower the training step and parameter initialization."""
    session = make_session(e)
    with jax.set_mesh(session.mesh):
        init = jax.jit(lambda: init_params(session.model, e)).lower()
    return step_text(e) + init.as_text()


def forward_text(e):
    session = Session(e, make_session(e).mesh, TOKENIZER)
    with jax.set_mesh(session.mesh):
        run = jax.jit(lambda params, batch: session.model.apply({"params": params}, **batch.inputs))
        return run.lower(session.abstract_state.params, session.abstract_batch).as_text()


def first_batch(e):
    tokenizer = e.data.build_tokenizer()
    batch = next(e.data.train_iterator(tokenizer, seed=e.seed))
    return batch.tokens


@cache
def cached_representation(e, kind):
    return REPRESENTATIONS[kind](e)


REPRESENTATIONS = {
    "step": step_text,
    "evaluation": evaluation_text,
    "init and evaluation": init_and_evaluation_text,
    "forward": forward_text,
    "state": initial_params,
    "batches": first_batch,
    "programs": programs,
}


# Parts of the representations that take a third of the time to lower. If a part differs, the whole
# does.
PARTS = {"step": "evaluation", "programs": "init and evaluation"}


def differ(e, changed, kind):
    part = PARTS.get(kind) if changed.model != e.model else None
    if part and cached_representation(e, part) != REPRESENTATIONS[part](changed):
        return True
    return not np.array_equal(cached_representation(e, kind), REPRESENTATIONS[kind](changed))


@pytest.mark.long
@pytest.mark.parametrize("field", CHANGES)
def test_changed_field_changes_representation(base, field):
    e, other = base
    text, kind = CHANGES[field]
    changed = configs.override(e, field, text.format(other=other))
    assert configs.differences(e, changed)
    assert differ(e, changed, kind)


@pytest.mark.long
@pytest.mark.parametrize(("choice", "field"), COMPONENT_CHANGES, ids=str)
def test_changed_field_of_other_component_changes_representation(base, choice, field):
    path, _, component = choice.partition("=")
    e = configs.override(base[0], path, component)
    text, kind = COMPONENT_CHANGES[choice, field]
    assert differ(e, configs.override(e, f"{path}.{field}", text), kind)


@pytest.mark.long
@pytest.mark.parametrize(("source", "field"), SOURCE_FIELDS, ids=str)
def test_changed_field_of_model_with_source_changes_representation(source, field):
    e, changes = SOURCE_EXPERIMENTS[source]
    changed = configs.override(e, field, changes[field])
    assert configs.differences(e, changed)
    assert differ(e, changed, "programs")


def test_representations_of_equal_experiments_are_equal(base):
    """Without this property, the tests above would prove nothing."""
    e, _ = base
    for kind, represent in REPRESENTATIONS.items():
        assert np.array_equal(cached_representation(e, kind), represent(dataclasses.replace(e)))
