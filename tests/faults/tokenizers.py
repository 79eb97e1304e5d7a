"""Changed tokenizer files and hostile chat templates of a checkpoint."""

import json
import shutil
from pathlib import Path
from random import Random

from tests.faults.harness import Harness
from tests.faults.mutate import odd_bytes, odd_json, replace_file
from tests.faults.process import Result

MESSAGES = [{"role": "user", "content": "the cat sat"}]
TEMPLATES = (
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ 10**(10**9) }}",
    "{{ ('a' * 10**6).center(10**10) }}",
    "{{ '%2000000000d' % 1 }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% for i in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{% set ns = namespace(x=[0]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{{ raise_exception('a\nb') }}",
    "{{ ().__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch hacked') }}",
    "{{ strftime_now('%Y' * 10**8) }}",
    "{{ lipsum(n=10**9) }}",
    "{{ 'a' | indent(10**10) }}",
    "{{ 'x' | replace('', 'x' * 10**5) | replace('x', 'x' * 10**6) }}",
    "{{ range(10**12) | list }}",
    "{{ (range(10**9) | batch(1) | list) }}",
    "{{ '\\udcff' }}",
    "{% include 'x' %}",
    "{{ messages[5].x.y }}",
    "{{ undefined_ + 1 }}",
    "{% if %}",
    "{{",
    "(" * 5000,
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{% if 1 %}" * 500 + "x" + "{% endif %}" * 500,
    "",
)
VOCABULARIES = {
    "vocab.txt": (
        b"\xff\xfe\n[UNK]\n",
        b"",
        b"a\nb\n",
        b"[UNK]\n[CLS]\n[SEP]\n[PAD]\n[MASK]\nthe\n",
        b"\0" * 99,
    ),
    "vocab.json": (b'{"a":"x"}', b'{"a":1}', b"[]", b'{"a":-1}', b'{"a":300000000}', b"{}", b"null", b"\xff"),
    "merges.txt": (b"", b"a b\n", b"\xff\xff\n", b"a\n", b"#version\na b c\n"),
    "tokenizer.model": (b"", b"\0", b"\xff" * 50, b"\n\x05\n\x01a\x15\0"),
    "spiece.model": (b"", b"x"),
    "source.spm": (b"", b"x"),
}
CLASSES = (
    "BertTokenizer",
    "GPT2Tokenizer",
    "LlamaTokenizer",
    "T5Tokenizer",
    "MarianTokenizer",
    ["x"],
    5,
    {},
    "",
    None,
)


def case(rng: Random, harness: Harness, number: int) -> Result:
    """Read a changed tokenizer, encode and decode with it, and render its chat template."""
    folder = harness.folder()
    hf = folder / "hf"
    shutil.copytree(harness.checkpoint, hf, ignore=shutil.ignore_patterns("*.safetensors*"))
    kind = rng.choice((_template, _template, _json, _json, _vocabulary, _identifiers, _any_file))
    tried = kind(rng, hf)

    def use() -> None:
        from etils import epath

        from attnlab.pretrained import import_export

        tokenizer = import_export.read_tokenizer(epath.Path(hf))
        if tokenizer is not None:
            tokenizer.decode(tokenizer.encode("the cat sat \u00e9 \U0001f600").tolist())
            _ = tokenizer.bos_tokens, tokenizer.token_bytes, tokenizer.encode_source("the cat")
            tokenizer.encode_chat(MESSAGES)

    outcome = harness.call(folder, use)
    return outcome.result(tried, "code ran" if (folder / "hacked").exists() else "")


def _template(rng: Random, hf: Path) -> str:
    template = rng.choice(TEMPLATES)
    if rng.random() < 0.2:
        template = odd_bytes(rng, (hf / "chat_template.jinja").read_bytes()).decode(errors="surrogateescape")
    if rng.random() < 0.3:
        (hf / "chat_template.jinja").unlink()
        file = hf / "tokenizer_config.json"
        value = rng.choice(
            (template, [{"name": "default", "template": template}], [template], {"x": template})
        )
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": value}))
    else:
        (hf / "chat_template.jinja").write_bytes(template.encode(errors="surrogatepass"))
    return f"template {template[:70]!r}"


def _json(rng: Random, hf: Path) -> str:
    file = hf / rng.choice(("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"))
    fields = json.loads(file.read_text())
    if file.name == "tokenizer.json" and rng.random() < 0.5:
        part = rng.choice([name for name in fields if isinstance(fields[name], dict | list)])
        text = json.dumps(fields | {part: "@part@"}).replace('"@part@"', odd_json(rng, fields[part]))
        file.write_text(text, errors="surrogatepass")
        return f"{part} of {file.name}"
    file.write_text(odd_json(rng, fields), errors="surrogatepass")
    return f"JSON of {file.name}"


def _identifiers(rng: Random, hf: Path) -> str:
    """Give a token of the vocabulary a large or odd id."""
    file = hf / "tokenizer.json"
    fields = json.loads(file.read_text())
    number = rng.choice((300_000_000, 2**32 - 1, 2**32, -1, 10**6, 10**12, 0, 2.5, "5", None))
    if rng.random() < 0.7:
        fields["model"]["vocab"][rng.choice(list(fields["model"]["vocab"]))] = number
    else:
        fields["added_tokens"] = [
            {"id": number, "content": "<new>", "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        ]
    file.write_text(json.dumps(fields))
    return f"a token with id {number}"


def _vocabulary(rng: Random, hf: Path) -> str:
    (hf / "tokenizer.json").unlink()
    name = rng.choice(list(VOCABULARIES))
    for file in {name, *({"vocab.json", "merges.txt"} if name in ("vocab.json", "merges.txt") else ())}:
        (hf / file).write_bytes(rng.choice(VOCABULARIES[file]))
    settings = json.loads((hf / "tokenizer_config.json").read_text()) | {
        "tokenizer_class": rng.choice(CLASSES)
    }
    (hf / "tokenizer_config.json").write_text(json.dumps(settings))
    return f"{name} with {settings['tokenizer_class']}"


def _any_file(rng: Random, hf: Path) -> str:
    file = rng.choice(sorted(hf.iterdir()))
    if rng.random() < 0.5:
        return f"{replace_file(rng, file)} for {file.name}"
    file.write_bytes(odd_bytes(rng, file.read_bytes()))
    return f"bytes of {file.name}"
