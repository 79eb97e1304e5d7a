"""transformers LLaVA and PaliGemma with random weights: outputs, generation and export."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from etils import epath
from PIL import Image
from safetensors.numpy import load_file, save_file
from tokenizers import models, pre_tokenizers, processors, trainers

from attnlab import sharding
from attnlab.data import preprocessor
from attnlab.data.images import ImageProcessor
from attnlab.generation import Generator, SamplingParams, prefill, source_inputs
from attnlab.inspect.maps import in_order
from attnlab.models import VisionLanguageConfig
from attnlab.pretrained import import_export, load
from attnlab.pretrained.families import FAMILIES
from attnlab.pretrained.hf_config import HFConfig
from tests.pretrained.hf_models import assert_close, positions_of, save_and_import, saved_gradients

pytestmark = pytest.mark.parity

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}  # fmt: skip
TEXT = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
# The image token is inside (66) or outside (70) the vocabulary; projectors with and without bias.
CASES = {
    "llava": ("Llava", "CLIPVision", "Llama", {"image_token_index": 66}, {"vision_feature_layer": -2}),
    "llava, first layer": ("Llava", "CLIPVision", "Llama", {"image_token_index": 66}, {"vision_feature_layer": 1, "multimodal_projector_bias": False, "projector_hidden_act": "relu"}),
    "paligemma": ("PaliGemma", "SiglipVision", "Gemma", {"image_token_index": 70}, {"projection_dim": 32, "hidden_size": 32}),
}  # fmt: skip
STEPS, PATCHES = 32, 4


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    transformers = pytest.importorskip("transformers")

    def make(case, folder=None, image_token_index=None, **text_changes):
        name, vision, text, *settings = CASES[case]
        gemma = {"head_dim": 16, "num_key_value_heads": 1} if text == "Gemma" else {}
        head = {"vision_use_head": False} if vision == "SiglipVision" else {}
        config = getattr(transformers, f"{name}Config")(
            vision_config=getattr(transformers, f"{vision}Config")(**VISION, **head),
            text_config=getattr(transformers, f"{text}Config")(**TEXT | gemma | text_changes),
            **({"image_token_index": image_token_index} if image_token_index else settings[0]),
            **settings[1],
        )
        for part in (config, config.vision_config, config.text_config):
            part._attn_implementation = "eager"
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
        return save_and_import(model, folder or tmp_path_factory.mktemp("imported"))

    return cache(make)


def inputs(imported, left):
    """Return tokens (B, T) with image tokens, their mask, the mask of the prompt, and images."""
    rng, image_token = np.random.default_rng(1), imported.config.image_token_id
    lengths, before = (13, 10), (0, 0) if imported.config.bidirectional_prompt else (3, 2)
    ids, valid = np.zeros((2, 13), np.int64), np.zeros((2, 13), np.int32)
    for row, (length, first) in enumerate(zip(lengths, before, strict=True)):
        span = slice(13 - length, 13) if left else slice(0, length)
        text = rng.integers(3, 66, length)
        text[first : first + PATCHES] = image_token
        ids[row, span], valid[row, span] = text, 1
    prompt = valid * (positions_of(valid) < 8)
    pixels = rng.normal(size=(2, *imported.config.source_shape)).astype(np.float32)
    return ids, valid, prompt, pixels


def hf_inputs(imported, ids, valid, prompt, pixels):
    torch = pytest.importorskip("torch")
    given = {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(valid),
        "pixel_values": torch.tensor(pixels.transpose(0, 3, 1, 2)),
    }
    return given | (
        {"token_type_ids": torch.tensor(1 - prompt)} if imported.config.bidirectional_prompt else {}
    )


def outputs(model, ids, valid, positions, pixels, prompt):
    hidden = model.hidden(ids, valid, positions, source=pixels, prompt=prompt)
    return hidden, model.decoder.logits_of(hidden)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("case", CASES)
def test_logits_hidden_states_and_maps(imported, case, left):
    torch = pytest.importorskip("torch")
    imported = imported(case)
    ids, valid, prompt, pixels = inputs(imported, left)
    with torch.no_grad():
        expected = imported.hf_model(
            **hf_inputs(imported, ids, valid, prompt, pixels),
            position_ids=torch.tensor(positions_of(valid)),
            output_hidden_states=True,
            output_attentions=True,
        )
    with jax.set_mesh(imported.mesh):
        run = jax.jit(partial(imported.model.apply, method=outputs, mutable=["intermediates"]))
        given = jax.tree.map(jnp.asarray, (ids, valid, positions_of(valid), pixels, prompt))
        results, captured = run({"params": imported.params}, *given)
    hidden, logits = map(np.asarray, results)
    real, layers = valid.astype(bool), captured["intermediates"]["decoder"]["layers"]
    assert_close(logits[real], expected.logits[real])
    for actual, wanted in zip([*in_order(layers, "hidden"), hidden], expected.hidden_states, strict=True):
        assert_close(np.asarray(actual)[real], wanted[real])
    rows = real.nonzero()[0], slice(None), real.nonzero()[1]
    maps = np.asarray(in_order(layers, "attention", "attention_weights"))
    for actual, wanted in zip(maps, expected.attentions, strict=True):
        assert_close(actual[rows], wanted.numpy()[rows])


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(imported, case, tmp_path):
    torch = pytest.importorskip("torch")
    imported = imported(case)
    ids, valid, prompt, pixels = inputs(imported, left=False)
    answers = valid * (1 - prompt)
    labels = torch.tensor(np.where(answers, ids, -100))
    imported.hf_model.zero_grad()
    loss = imported.hf_model(**hf_inputs(imported, ids, valid, prompt, pixels), labels=labels).loss
    loss.backward()
    for p in imported.hf_model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    targets, weights = np.roll(ids, -1, axis=1), np.roll(answers, -1, axis=1)
    weights[:, -1] = 0

    def loss_fn(params):
        given = map(jnp.asarray, (ids, np.where(weights, targets, 0), valid, positions_of(valid)))
        images = {"source": jnp.asarray(pixels), "prompt": jnp.asarray(prompt)}
        s = imported.model.apply({"params": params}, *given, **images, method="loss_terms")
        return jnp.sum((s.lse - s.target_logit) * weights) / weights.sum()

    with jax.set_mesh(imported.mesh):
        value, grads = jax.jit(jax.value_and_grad(loss_fn))(imported.params)
    assert_close(value, loss.detach(), 1e-5)
    wanted, actual = saved_gradients(imported.hf_model, tmp_path), imported.named(grads)
    unused = {name for name in wanted.keys() - actual.keys() if not wanted[name].any()}
    assert actual.keys() | unused == wanted.keys()
    for name, grad in actual.items():
        # A bias of the keys alone has no gradient except for rounding.
        bound = 1e-6 if name.endswith("k_proj.bias") else 1e-3 * np.abs(wanted[name]).max()
        np.testing.assert_allclose(grad, wanted[name], rtol=1e-3, atol=bound, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_export_reproduces_checkpoint(imported, case, tmp_path):
    """The export omits the layers of the tower after the selected feature layer."""
    torch = pytest.importorskip("torch")
    imported, folder = imported(case), epath.Path(tmp_path) / "out"
    family, config = imported.family, imported.config
    import_export.write_checkpoint(folder, config, imported.params, epath.Path(imported.folder))
    exported, original = (load_file(f / "model.safetensors") for f in (folder, imported.folder))
    for name in original.keys() - exported.keys():
        layer = re.fullmatch(r"vision_tower\.encoder\.layers\.(\d)\..*", name)
        assert layer and int(layer[1]) >= config.encoder.depth, name
    for name in exported:
        np.testing.assert_array_equal(exported[name], original[name], err_msg=name)
    assert import_export.read_config(folder) == (family, config)
    reloaded, report = type(imported.hf_model).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    ids, valid, prompt, pixels = inputs(imported, left=False)
    with torch.no_grad():
        given = hf_inputs(imported, ids, valid, prompt, pixels)
        assert_close(reloaded(**given).logits, imported.hf_model(**given).logits)


def test_older_tensor_names(imported, tmp_path):
    imported = imported("paligemma")
    tensors = load_file(imported.folder / "model.safetensors")
    older = {n.replace("vision_tower.", "vision_tower.vision_model."): x for n, x in tensors.items()}
    save_file(older, tmp_path / "model.safetensors")
    params = import_export.read_params(epath.Path(tmp_path), imported.family, imported.abstract)
    jax.tree.map(np.testing.assert_array_equal, params, imported.params)


@pytest.mark.parametrize("case", ["llava", "paligemma"])
def test_greedy_generation(imported, case):
    torch = pytest.importorskip("torch")
    imported = imported(case)
    ids, valid, _, pixels = inputs(imported, left=True)
    imported.hf_model.generation_config.eos_token_id = None
    with torch.no_grad():
        given = hf_inputs(imported, ids, valid, np.ones_like(valid), pixels)
        expected = imported.hf_model.generate(**given, do_sample=False, max_new_tokens=STEPS, pad_token_id=0)
    with jax.set_mesh(imported.mesh):
        tokens, segments = jnp.asarray(ids, jnp.int32), jnp.asarray(valid)
        slots = tokens.shape[1] + STEPS
        prefix = prefill(imported.model, slots, imported.params, tokens, segments, source=jnp.asarray(pixels))
        decode, got = jax.jit(lambda prefix, params, new: prefix.decode(imported.model, params, new)), []
        for _ in range(STEPS):
            got.append(np.asarray(prefix.logits).argmax(-1))
            prefix = decode(prefix, imported.params, got[-1])
    assert np.transpose(got).tolist() == expected[:, tokens.shape[1] :].tolist()


def processor(kind, folder):
    """Save and return the transformers processor of prompts and images."""
    transformers = pytest.importorskip("transformers")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", "first" if kind == "llava" else "never")
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    special = ["<pad>", "<s>", "</s>"]  # ids as in TEXT
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=special, show_progress=False)
    backend.train_from_iterator(["USER: Where is this? ASSISTANT: caption en\n"], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    size = {"height": 8, "width": 8}
    if kind == "llava":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        images = transformers.CLIPImageProcessorPil(size=size, crop_size=size)
        options = {"patch_size": 4, "vision_feature_select_strategy": "default"}
        processor = transformers.LlavaProcessor(images, tokenizer, num_additional_image_tokens=1, **options)
    else:
        images = transformers.SiglipImageProcessorPil(size=size, image_seq_length=PATCHES)
        processor = transformers.PaliGemmaProcessor(images, tokenizer)
    processor.save_pretrained(folder)
    return processor


@pytest.mark.parametrize(("kind", "prompts"), [
    ("llava", ["USER: <image>\nWhere is this? ASSISTANT:", "<image> en caption", "is<image>this"]),
    ("paligemma", ["caption en", "<image>Where is this?", ""]),
])  # fmt: skip
def test_generate_from_images_and_prompts(imported, kind, prompts, tmp_path):
    """Images and prompts to text with only the files of the folder."""
    torch = pytest.importorskip("torch")
    hf_processor = processor(kind, tmp_path)
    size, image_token = len(hf_processor.tokenizer), hf_processor.image_token_id
    model = imported(kind, vocab_size=size, image_token_index=image_token, folder=tmp_path).hf_model
    images = [np.random.default_rng(n).integers(0, 256, (9, 12, 3), np.uint8) for n in range(3)]
    expected = []
    for prompt, image in zip(prompts, images, strict=True):
        given = hf_processor(text=prompt, images=Image.fromarray(image), return_tensors="pt")
        given.pop("labels", None)
        with torch.no_grad():
            out = model.generate(**given, do_sample=False, max_new_tokens=STEPS)
        generated = out[0, given["input_ids"].shape[1] :]
        expected.append(hf_processor.decode(generated, skip_special_tokens=True))

    mesh = sharding.make_mesh(sharding.parse_mesh("single", 1))
    loaded, image_processor = (
        load(str(tmp_path), mesh),
        ImageProcessor.from_settings(preprocessor.read(tmp_path)),
    )
    generator = Generator(loaded.model, loaded.params, loaded.tokenizer, context=64, mesh=mesh)
    sources = list(map(image_processor, images))
    rows = generator(prompts, sources=sources, sampling=SamplingParams(0.0), max_new_tokens=STEPS)
    assert [row.text for row in rows] == expected and len({*expected}) == 3


def test_prompt_needs_exactly_one_image_token(tmp_path, refuses):
    processor("llava", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    tokenizer = import_export.read_tokenizer(epath.Path(tmp_path))
    (image_token,) = tokenizer.encode_prompt("<image>", tokenizer.vocab_size - 1)[1:]
    config = VisionLanguageConfig(image_token_id=image_token)
    for text, count in (("Where is this?", 0), ("<image> <image>", 2)):
        with refuses(f"a prompt must have <image> once, at its image; this one has it {count} times"):
            source_inputs.prompt_ids(config, tokenizer, text)
    assert 2 not in source_inputs.prompt_ids(
        config, tokenizer, "<image> </s>"
    )  # text never encodes to special tokens
    assert image_token not in tokenizer.encode_prompt("<image>")


@pytest.mark.parametrize(("model_type", "changes", "message"), [
    ("llava", {"vision_feature_select_strategy": "full"}, "'full' is not supported; it may be 'default'"),
    ("llava", {"vision_feature_layer": [1, 2]}, "vision_feature_layer=[1, 2]"),
    ("llava", {"text_config": {"model_type": "opt"}}, "config.json: text_config: model_type='opt'"),
])  # fmt: skip
def test_unsupported_settings_are_rejected(model_type, changes, message, refuses):
    vision = VISION | {"model_type": "clip_vision_model"}
    fields = {"vision_config": vision, "text_config": {"model_type": "llama"}, "image_token_index": 66, "projector_hidden_act": "gelu"}  # fmt: skip
    with refuses(message):
        FAMILIES[model_type].config(HFConfig(fields | changes, "config.json"))
