"""Tokenizers without tokenizer.json give the ids of transformers and SentencePiece."""

import json

import pytest
import tokenizers
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from attnlab.data import Tokenizer
from attnlab.pretrained import import_export

WORDS = "the cat sat on the mat because it was tired and then the naïve dog's 3 friends ran 42 miles home"
TEXTS = [WORDS, WORDS.title(), WORDS[::-1], "The  quick brown fox; isn't it? (Yes!) 12,345.67"] * 20
ODD = [
    "the cat sat", " the cat", "the  cat   sat ", "  ", "", "a", "The Cat's NAÏVE café", "naïve ﬁne ½ Ⅷ １２３",
    "日本語のテキスト", "emoji 🙂👩‍👩‍👧 x", "tab\tand\nnew\r\nlines\n\n", "x\u00a0y\u3000z\u200bw", "12345.678", "\u2581 under\u2581score",
    "don't they'll we've", "a\u0301 e\u0301", "Ωμέγα кот кошка", "!!!???...", "[UNK] [CLS] x",
]  # fmt: skip


def folder(path, model_type, settings=None, **fields):
    """Write the config files of a checkpoint."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": model_type} | fields))
    if settings is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return epath.Path(path)


def trained(path, kind, texts=TEXTS, **options):
    """Train and save a SentencePiece model; return its processor."""
    spm = pytest.importorskip("sentencepiece")
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(path.with_suffix("")), model_type=kind,
        hard_vocab_limit=False, minloglevel=2, num_threads=1, **options,
    )  # fmt: skip
    path.with_suffix(".model").rename(path)
    return spm.SentencePieceProcessor(model_file=str(path))


LLAMA = {
    "vocab_size": 400, "byte_fallback": True, "normalization_rule_name": "identity", "split_digits": True,
    "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True,
}  # fmt: skip
GEMMA = LLAMA | {
    "add_dummy_prefix": False, "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "pad_piece": "<pad>", "eos_piece": "<eos>",
    "bos_piece": "<bos>", "user_defined_symbols": ["<mask>", "<start_of_turn>", "\n", "\n\n"],
}  # fmt: skip
T5 = {"vocab_size": 150, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}


def assert_same_ids(tokenizer, hf_tokenizer, texts=ODD):
    for text in texts:
        assert tokenizer.encode_document(text) == hf_tokenizer(text)["input_ids"], text
        assert tokenizer.encode(text).tolist() == hf_tokenizer(text, add_special_tokens=False)["input_ids"], (
            text
        )


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parity
def test_llama_equals_sentencepiece(tmp_path, legacy):
    (tmp_path / "llama").mkdir()
    processor = trained(tmp_path / "llama" / "tokenizer.model", "bpe", **LLAMA)
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "chat_template": "{{ bos_token }}x"}
    tokenizer = import_export.read_tokenizer(folder(tmp_path / "llama", "llama", settings))
    for text in ODD if legacy else [text for text in ODD if not text.startswith((" ", "\u2581"))]:
        assert tokenizer.encode(text).tolist() == processor.encode(text), text
        assert tokenizer.decode(processor.encode(text)) == text.replace("\u2581", " ")
    assert tokenizer.encode_document("the") == tokenizer.encode_prompt("the") == [1, *processor.encode("the")]
    assert (tokenizer.eos_id, tokenizer.bos_tokens, tokenizer.encode_chat([])[0]) == (2, [1], 1)
    assert tokenizer.token_bytes[processor.encode("é")].sum() == 3  # two bytes of é and the space before it


@pytest.mark.parametrize("name", ["llama", "gemma", "t5"])
@pytest.mark.parity
def test_sentencepiece_files_equal_transformers(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    options, file, kind = {
        "llama": (LLAMA, "tokenizer.model", "bpe"),
        "gemma": (GEMMA, "tokenizer.model", "bpe"),
        "t5": (T5, "spiece.model", "unigram"),
    }[name]
    path = tmp_path / name
    path.mkdir()
    trained(path / file, kind, **options)
    cls = {"llama": "LlamaTokenizer", "gemma": "GemmaTokenizer", "t5": "T5Tokenizer"}[name]
    settings = {"tokenizer_class": cls} | (
        {} if name == "t5" else {"add_bos_token": True, "add_eos_token": name == "llama"}
    )
    tokenizer = import_export.read_tokenizer(folder(path, name, settings))
    hf_tokenizer = getattr(transformers, cls).from_pretrained(path)
    assert_same_ids(tokenizer, hf_tokenizer)
    assert tokenizer.vocab_size == len(hf_tokenizer)


GERMAN = "die Katze saß auf der Matte weil sie müde war und dann rannte der Hund mit 3 Freunden nach Hause"
OPUS = {"vocab_size": 90, "bos_id": -1}
CODES = [">>deu<<", ">>fra<<"]


def opus(path):
    """Write a Marian tokenizer: two SentencePiece models and an incomplete joint vocabulary."""
    path = folder(path, "marian", {"source_lang": "eng", "target_lang": "deu"}, eos_token_id=0)
    pieces = {"</s>": 0, "<unk>": 1}
    for name, texts in {"source": TEXTS, "target": [GERMAN, GERMAN.title(), GERMAN[::-1]] * 20}.items():
        spm = trained(path / f"{name}.spm", "unigram", texts=texts, **OPUS)
        spm_pieces = [spm.id_to_piece(i) for i in range(len(spm))]
        pieces |= {
            piece: len(pieces) + i
            for i, piece in enumerate(p for p in spm_pieces if p not in {*pieces, "q", "R", "\u2581the"})
        }
    pieces |= {token: len(pieces) + i for i, token in enumerate([*CODES, "<pad>"])}
    (path / "vocab.json").write_text(json.dumps(pieces))
    return path


@pytest.fixture(scope="module")
def marian_tokenizers(tmp_path_factory):
    """Return the imported tokenizer, the same saved and reloaded, and that of transformers."""
    transformers = pytest.importorskip("transformers")
    path = opus(tmp_path_factory.mktemp("opus"))
    tokenizer = import_export.read_tokenizer(path)
    tokenizer.save(tmp_path_factory.mktemp("run") / "tokenizer.json")
    reloaded = Tokenizer.load(tmp_path_factory.getbasetemp() / "run0" / "tokenizer.json")
    return tokenizer, reloaded, transformers.MarianTokenizer.from_pretrained(path)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from([*f"{WORDS} {GERMAN}".split(), *CODES, "  ", ">>", "<<"]), st.text(max_size=4)
        )
    )
)
@pytest.mark.parity
def test_marian_equals_transformers(marian_tokenizers, words):
    """Ids of a source and a target, and their decoded texts."""
    *both, hf_tokenizer = marian_tokenizers
    for text in (" ".join(words), "".join(words), *ODD):
        if any(token in text for token in hf_tokenizer.all_special_tokens):
            continue  # transformers parses special tokens in texts; here they are plain text
        for tokenizer in both:
            source, target = hf_tokenizer(text)["input_ids"], hf_tokenizer(text_target=text)["input_ids"]
            assert tokenizer.encode_source(text) == source, text
            assert (
                tokenizer.encode_document(text) == target and tokenizer.encode(text).tolist() == target[:-1]
            ), text
            for ids in (source, target):
                assert tokenizer.decode(ids) == hf_tokenizer.decode(ids, skip_special_tokens=True), text


@pytest.mark.parity
def test_marian_expected_values(marian_tokenizers, tmp_path, refuses):
    tokenizer, _, hf_tokenizer = marian_tokenizers
    assert (
        tokenizer.encode_source(">>deu<< the cat")[0] == hf_tokenizer.convert_tokens_to_ids(">>deu<<")
        and tokenizer.bos_tokens == []
    )
    unknown = tokenizer.encode_source("日")
    assert tokenizer.encode_source("ß") != unknown and 1 in unknown  # ß is a piece of the other language
    assert (tokenizer.eos_id, tokenizer.decode(tokenizer.encode_document(GERMAN))) == (0, GERMAN)
    assert tokenizer.token_bytes[tokenizer.encode_document("müde")].sum() == 6
    path = opus(tmp_path)
    folder(path, "marian", {"separate_vocabs": True})
    with refuses("separate_vocabs=True is not supported"):
        import_export.read_tokenizer(path)


BERT = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat sat on mat ##s ##at a na ##ive dog ' s 3 ! ? . , 日 本 ca ##fe ##f ##e".split()


@pytest.mark.parametrize(
    "settings", [{}, {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False}]
)
@pytest.mark.parity
def test_word_piece_equals_transformers(tmp_path, settings):
    transformers = pytest.importorskip("transformers")
    path = folder(tmp_path, "bert", {"tokenizer_class": "BertTokenizer", **settings})
    (path / "vocab.txt").write_text("\n".join(BERT) + "\n")
    tokenizer = import_export.read_tokenizer(path)
    hf_tokenizer = transformers.BertTokenizer.from_pretrained(tmp_path)
    assert_same_ids(tokenizer, hf_tokenizer, [text for text in ODD if "[" not in text])
    assert tokenizer.encode_document("the cats") == [2, 5, 6, 10, 3] and tokenizer.encode_prompt(
        "the cat"
    ) == [2, 5, 6]
    assert tokenizer.decode(tokenizer.encode_document("the cats")) == "the cats"


@pytest.mark.parametrize("name", ["GPT2", "Roberta", "CLIP"])
@pytest.mark.parity
def test_byte_level_bpe_equals_transformers(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    path = folder(tmp_path, {"GPT2": "gpt2", "Roberta": "roberta", "CLIP": "clip"}[name])
    special = {"GPT2": ["<|endoftext|>"], "Roberta": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]}
    special["CLIP"] = ["<|startoftext|>", "<|endoftext|>"]
    ending = {"end_of_word_suffix": "</w>"} if name == "CLIP" else {}
    backend = tokenizers.Tokenizer(models.BPE(**ending))
    spaces = [pre_tokenizers.Whitespace()] if name == "CLIP" else []
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*spaces, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special[name], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **ending,
    )  # fmt: skip
    backend.train_from_iterator([t.lower() for t in TEXTS], trainer)
    backend.model.save(str(tmp_path))
    tokenizer = import_export.read_tokenizer(path)
    assert_same_ids(tokenizer, getattr(transformers, f"{name}Tokenizer").from_pretrained(tmp_path))
    if name != "CLIP":
        assert all(tokenizer.decode(tokenizer.encode_document(text)) == text for text in ODD)


def test_added_tokens_and_unsupported_files(tmp_path, refuses, monkeypatch):
    settings = {"added_tokens_decoder": {len(BERT): {"content": "[USER]", "special": True}}}
    path = folder(tmp_path / "bert", "bert", settings)
    (path / "vocab.txt").write_text("\n".join(BERT))
    tokenizer = import_export.read_tokenizer(path)
    assert tokenizer.vocab_size == len(BERT) + 1 and tokenizer.token_bytes[-1] == 0
    (path / "added_tokens.json").write_text(json.dumps({"[OTHER]": len(BERT) + 2}))
    with refuses("token [OTHER] must have id"):
        import_export.read_tokenizer(path)
    folder(path, "bert", {"tokenizer_class": "MPNetTokenizer"})
    with refuses("vocab.txt: MPNetTokenizer needs a tokenizer.json; without one, BertTokenizer"):
        import_export.read_tokenizer(path)
    path = folder(tmp_path / "llama", "llama")
    (path / "tokenizer.model").write_bytes(b"nothing")
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with refuses(
        "tokenizer.model requires the package sentencepiece", 'pip install "attnlab[sentencepiece]"'
    ):
        import_export.read_tokenizer(path)


SEPARATORS = ("\u2028", "\u0085", "\u000b", "\u001e")


@pytest.mark.parametrize("separator", SEPARATORS)
def test_words_that_are_line_separators_keep_the_ids_of_later_words(separator, tmp_path):
    """bert-base-chinese has the word U+2028."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", separator, "b", "c"]
    (tmp_path / "vocab.txt").write_text("\n".join([*words, ""]), encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    tokenizer = import_export.read_tokenizer(epath.Path(tmp_path))
    assert tokenizer.encode_document("a b c") == [2, 5, 7, 8, 3]
    assert tokenizer.vocab_size == len(words)
