"""Chat templates give the same token ids as transformers."""

import json

import pytest
from etils import epath

from attnlab.pretrained import import_export
from tests.pretrained.small_llama import write

pytestmark = pytest.mark.parity

TEMPLATES = {
    "turns": """
{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\nBe kind.<|im_end|>\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""",
    "instructions": "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must take turns') }}{% endif %}"
    "{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "headers": """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if tools is not none %}{{- "Tools: " + tools | tojson }}{%- endif %}
{%- if documents %}{{- raise_exception("no documents") }}{%- endif %}
{%- set ns = namespace(count=0) %}
{%- for message in messages %}
    {%- set ns.count = ns.count + 1 %}
    {{- '<|start|>' + message['role'] + '<|end|>\n\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{{- ns.count | string + ' on ' + date_string + strftime_now('%Y') }}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\n\n' }}{%- endif %}""",
    "odd": """
{% for message in messages %}
  {% if message.role == "system" %}{% continue %}{% endif %}
  {% if loop.index > 3 %}{% break %}{% endif %}
  {{ {"role": message.role, "é": [1, 2]} | tojson(indent=2) }} {{ dict(a=1) }}
  {% generation %}
  {{ message.content | upper | replace("CAT", "dog") }}
  {% endgeneration %}
{% endfor %}
{{ messages | map(attribute="role") | join(",") }} {{ (messages | last).content[-3:] }} {{ pad_token or "none" }}
""",
}  # fmt: skip
CHAT = [{"role": "user", "content": " the cat?\n"}, {"role": "assistant", "content": "naïve <eos> cat "}]
CHATS = [
    [*CHAT, {"role": "user", "content": "and\n\nthe mat 🙂"}],
    [{"role": "system", "content": "the\tcat"}, CHAT[0]],
    CHAT,
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_tokens_equal_transformers(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    write(epath.Path(tmp_path))
    settings = {"eos_token": "<eos>", "bos_token": "<eos>", "chat_template": TEMPLATES[name]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = import_export.read_tokenizer(epath.Path(tmp_path))
    hf_tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for chat in CHATS:
        expected = hf_tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert tokenizer.encode_chat(chat) == expected
    several = [{"name": "default", "template": TEMPLATES[name]}, {"name": "tool_use", "template": "x"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": several}))
    assert import_export.read_tokenizer(epath.Path(tmp_path)).encode_chat(chat) == expected
