"""LLaVA and PaliGemma of transformers with random weights, read, compared and written again."""

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
from tests.pretrained.hf_models import close, positions_of, saved, saved_gradients

pytestmark = pytest.mark.parity

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}  # fmt: skip
TEXT = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
# A marker that is a word of the vocabulary, and one beyond it; the projector with biases and without.
CASES = {
    "llava": ("Llava", "CLIPVision", "Llama", {"image_token_index": 66}, {"vision_feature_layer": -2}),
    "llava, first layer": ("Llava", "CLIPVision", "Llama", {"image_token_index": 66}, {"vision_feature_layer": 1, "multimodal_projector_bias": False, "projector_hidden_act": "relu"}),
    "paligemma": ("PaliGemma", "SiglipVision", "Gemma", {"image_token_index": 70}, {"projection_dim": 32, "hidden_size": 32}),
}  # fmt: skip
STEPS, PATCHES = 32, 4


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
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
        return saved(model, folder or tmp_path_factory.mktemp("peer"))

    return cache(make)


def inputs(peer, left):
    """Tokens (B, T) with an image among them, which are there, which are the prompt's; and images."""
    rng, marker = np.random.default_rng(1), peer.config.image_token_id
    lengths, before = (13, 10), (0, 0) if peer.config.bidirectional_prompt else (3, 2)
    ids, there = np.zeros((2, 13), np.int64), np.zeros((2, 13), np.int32)
    for row, (length, first) in enumerate(zip(lengths, before, strict=True)):
        here = slice(13 - length, 13) if left else slice(0, length)
        text = rng.integers(3, 66, length)
        text[first : first + PATCHES] = marker
        ids[row, here], there[row, here] = text, 1
    prompt = there * (positions_of(there) < 8)
    pixels = rng.normal(size=(2, *peer.config.source_shape)).astype(np.float32)
    return ids, there, prompt, pixels


def for_torch(peer, ids, there, prompt, pixels):
    torch = pytest.importorskip("torch")
    given = {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(there),
        "pixel_values": torch.tensor(pixels.transpose(0, 3, 1, 2)),
    }
    return given | ({"token_type_ids": torch.tensor(1 - prompt)} if peer.config.bidirectional_prompt else {})


def outputs(model, ids, there, positions, pixels, prompt):
    hidden, _ = model.hidden(ids, there, positions, source=pixels, prompt=prompt)
    return hidden, model.decoder.logits_of(hidden)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("case", CASES)
def test_logits_hidden_states_and_maps(peer, case, left):
    torch = pytest.importorskip("torch")
    peer = peer(case)
    ids, there, prompt, pixels = inputs(peer, left)
    with torch.no_grad():
        expected = peer.hf_model(
            **for_torch(peer, ids, there, prompt, pixels),
            position_ids=torch.tensor(positions_of(there)),
            output_hidden_states=True,
            output_attentions=True,
        )
    with jax.set_mesh(peer.mesh):
        run = jax.jit(partial(peer.model.apply, method=outputs, mutable=["intermediates"]))
        given = jax.tree.map(jnp.asarray, (ids, there, positions_of(there), pixels, prompt))
        found, captured = run({"params": peer.params}, *given)
    hidden, logits = map(np.asarray, found)
    real, layers = there.astype(bool), captured["intermediates"]["decoder"]["layers"]
    close(logits[real], expected.logits[real])
    for ours, wanted in zip([*in_order(layers, "hidden"), hidden], expected.hidden_states, strict=True):
        close(np.asarray(ours)[real], wanted[real])
    rows = real.nonzero()[0], slice(None), real.nonzero()[1]
    maps = np.asarray(in_order(layers, "attention", "attention_weights"))
    for ours, wanted in zip(maps, expected.attentions, strict=True):
        close(ours[rows], wanted.numpy()[rows])


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(peer, case, tmp_path):
    torch = pytest.importorskip("torch")
    peer = peer(case)
    ids, there, prompt, pixels = inputs(peer, left=False)
    answers = there * (1 - prompt)
    labels = torch.tensor(np.where(answers, ids, -100))
    peer.hf_model.zero_grad()
    loss = peer.hf_model(**for_torch(peer, ids, there, prompt, pixels), labels=labels).loss
    loss.backward()
    for p in peer.hf_model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    targets, weights = np.roll(ids, -1, axis=1), np.roll(answers, -1, axis=1)
    weights[:, -1] = 0

    def ours(params):
        given = map(jnp.asarray, (ids, np.where(weights, targets, 0), there, positions_of(there)))
        images = {"source": jnp.asarray(pixels), "prompt": jnp.asarray(prompt)}
        s = peer.model.apply({"params": params}, *given, **images, method="loss_terms")
        return jnp.sum((s.lse - s.target_logit) * weights) / weights.sum()

    with jax.set_mesh(peer.mesh):
        value, grads = jax.jit(jax.value_and_grad(ours))(peer.params)
    close(value, loss.detach(), 1e-5)
    wanted, found = saved_gradients(peer.hf_model, tmp_path), peer.named(grads)
    unread = {name for name in wanted.keys() - found.keys() if not wanted[name].any()}
    assert found.keys() | unread == wanted.keys()
    for name, grad in found.items():
        # A bias of the keys alone has no gradient, but for rounding.
        bound = 1e-6 if name.endswith("k_proj.bias") else 1e-3 * np.abs(wanted[name]).max()
        np.testing.assert_allclose(grad, wanted[name], rtol=1e-3, atol=bound, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_written_again_it_is_the_same(peer, case, tmp_path):
    """But for the layers of a tower after the one that is read: with as many as there are, it is whole."""
    torch = pytest.importorskip("torch")
    peer, folder = peer(case), epath.Path(tmp_path) / "out"
    family, config = peer.family, peer.config
    import_export.write_checkpoint(folder, config, peer.params, epath.Path(peer.folder))
    written, first = (load_file(f / "model.safetensors") for f in (folder, peer.folder))
    for name in first.keys() - written.keys():
        layer = re.fullmatch(r"vision_tower\.encoder\.layers\.(\d)\..*", name)
        assert layer and int(layer[1]) >= config.encoder.depth, name
    for name in written:
        np.testing.assert_array_equal(written[name], first[name], err_msg=name)
    assert import_export.read_config(folder) == (family, config)
    again, report = type(peer.hf_model).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    ids, there, prompt, pixels = inputs(peer, left=False)
    with torch.no_grad():
        given = for_torch(peer, ids, there, prompt, pixels)
        close(again(**given).logits, peer.hf_model(**given).logits)


def test_names_of_older_checkpoints(peer, tmp_path):
    peer = peer("paligemma")
    tensors = load_file(peer.folder / "model.safetensors")
    older = {n.replace("vision_tower.", "vision_tower.vision_model."): x for n, x in tensors.items()}
    save_file(older, tmp_path / "model.safetensors")
    params = import_export.read_params(epath.Path(tmp_path), peer.family, peer.abstract)
    jax.tree.map(np.testing.assert_array_equal, params, peer.params)


@pytest.mark.parametrize("case", ["llava", "paligemma"])
def test_greedy(peer, case):
    torch = pytest.importorskip("torch")
    peer = peer(case)
    ids, there, _, pixels = inputs(peer, left=True)
    peer.hf_model.generation_config.eos_token_id = None
    with torch.no_grad():
        given = for_torch(peer, ids, there, np.ones_like(there), pixels)
        expected = peer.hf_model.generate(**given, do_sample=False, max_new_tokens=STEPS, pad_token_id=0)
    with jax.set_mesh(peer.mesh):
        tokens, segments = jnp.asarray(ids, jnp.int32), jnp.asarray(there)
        slots = tokens.shape[1] + STEPS
        prefix = prefill(peer.model, slots, peer.params, tokens, segments, source=jnp.asarray(pixels))
        read, got = jax.jit(lambda prefix, params, new: prefix.read(peer.model, params, new)), []
        for _ in range(STEPS):
            got.append(np.asarray(prefix.logits).argmax(-1))
            prefix = read(prefix, peer.params, got[-1])
    assert np.transpose(got).tolist() == expected[:, tokens.shape[1] :].tolist()


def processor(kind, folder):
    """What transformers prepares prompts and pictures by, saved."""
    transformers = pytest.importorskip("transformers")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", "first" if kind == "llava" else "never")
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    special = ["<pad>", "<s>", "</s>"]  # numbers as of TEXT
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=special, show_progress=False)
    backend.train_from_iterator(["USER: What is this? ASSISTANT: caption en\n"], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    size = {"height": 8, "width": 8}
    if kind == "llava":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        images = transformers.CLIPImageProcessorPil(size=size, crop_size=size)
        options = {"patch_size": 4, "vision_feature_select_strategy": "default"}
        made = transformers.LlavaProcessor(images, tokenizer, num_additional_image_tokens=1, **options)
    else:
        images = transformers.SiglipImageProcessorPil(size=size, image_seq_length=PATCHES)
        made = transformers.PaliGemmaProcessor(images, tokenizer)
    made.save_pretrained(folder)
    return made


@pytest.mark.parametrize(("kind", "prompts"), [
    ("llava", ["USER: <image>\nWhat is this? ASSISTANT:", "<image> en caption", "is<image>this"]),
    ("paligemma", ["caption en", "<image>What is this?", ""]),
])  # fmt: skip
def test_texts_of_pictures(peer, kind, prompts, tmp_path):
    """From pictures and prompts to texts, by the files of a folder alone."""
    torch = pytest.importorskip("torch")
    theirs = processor(kind, tmp_path)
    size, marker = len(theirs.tokenizer), theirs.image_token_id
    model = peer(kind, vocab_size=size, image_token_index=marker, folder=tmp_path).hf_model
    pictures = [np.random.default_rng(n).integers(0, 256, (9, 12, 3), np.uint8) for n in range(3)]
    expected = []
    for prompt, picture in zip(prompts, pictures, strict=True):
        given = theirs(text=prompt, images=Image.fromarray(picture), return_tensors="pt")
        given.pop("labels", None)
        with torch.no_grad():
            out = model.generate(**given, do_sample=False, max_new_tokens=STEPS)
        told = out[0, given["input_ids"].shape[1] :]
        expected.append(theirs.decode(told, skip_special_tokens=True))

    mesh = sharding.make_mesh(sharding.parse_mesh("single", 1))
    found, pixels = load(str(tmp_path), mesh), ImageProcessor.from_settings(preprocessor.read(tmp_path))
    generator = Generator(found.model, found.params, found.tokenizer, context=64, mesh=mesh)
    read = list(map(pixels, pictures))
    found = generator(prompts, sources=read, sampling=SamplingParams(0.0), max_new_tokens=STEPS)
    assert [row.text for row in found] == expected and len({*expected}) == 3


def test_where_an_image_is_to_be_is_said_once(tmp_path, refuses):
    processor("llava", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    tokenizer = import_export.read_tokenizer(epath.Path(tmp_path))
    (marker,) = tokenizer.encode_prompt("<image>", tokenizer.vocab_size - 1)[1:]
    config = VisionLanguageConfig(image_token_id=marker)
    for text, count in (("What is this?", 0), ("<image> <image>", 2)):
        with refuses(f"a prompt has <image> once, where its image is to be: this one has it {count} times"):
            source_inputs.prompt_ids(config, tokenizer, text)
    assert 2 not in source_inputs.prompt_ids(config, tokenizer, "<image> </s>")  # which no text can say
    assert marker not in tokenizer.encode_prompt("<image>")


@pytest.mark.parametrize(("kind", "changes", "told"), [
    ("llava", {"vision_feature_select_strategy": "full"}, "'full' is not supported; it may be 'default'"),
    ("llava", {"vision_feature_layer": [1, 2]}, "vision_feature_layer=[1, 2]"),
    ("llava", {"text_config": {"model_type": "opt"}}, "config.json: text_config: model_type='opt'"),
])  # fmt: skip
def test_what_is_not_here_is_refused(kind, changes, told, refuses):
    vision = VISION | {"model_type": "clip_vision_model"}
    said = {"vision_config": vision, "text_config": {"model_type": "llama"}, "image_token_index": 66, "projector_hidden_act": "gelu"}  # fmt: skip
    with refuses(told):
        FAMILIES[kind].config(HFConfig(said | changes, "config.json"))
