"""Chat templates of many models, conversations, and what a rendering of them teaches."""

from __future__ import annotations

from losa.data.rendering import Renderer
from losa.data.row_files import Row
from losa.data.sequences import IGNORED
from losa.recipe.sources import DataSource
from tests.helpers.tiny import tiny_tokenizer

SOURCE = DataSource(path="x")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A thinking block in answers after the last question only; tool results are part of the user's turn.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' and not "
    "(m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set content = m.content %}{% set thought = '' %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
    "{{ content }}{% for c in m.tool_calls or [] %}\n<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n"
    "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('alternate') }}{% endif %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA3 = (
    "<|start_header_id|>system<|end_header_id|>\n\nToday: {{ strftime_now('%d %b') }}\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif %}"
    "<|eot_id|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# The system's message goes into the last question, wherever that is.
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}"
    "{% endif %}{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if system is defined and loop.index0 >= messages | length - 2 %}{{ system }}\n\n{% endif %}"
    "{{ m.content.strip() }}[/INST]{% else %} {{ m.content.strip() }}<eos>{% endif %}{% endfor %}"
)
GENERATION = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<end>"
    "{% endgeneration %}{% else %}{{ m.content }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# DeepSeek-R1's: thoughts are dropped from history, and an answer is opened with one.
DROPS_THOUGHTS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<A>"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<end>{% else %}<U>{{ m.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<A><think>\n{% endif %}"
)
REVERSES = "{% for m in messages | reverse %}<{{ m.role }}>{{ m.content }}{% endfor %}"
MERGES = (
    "{% for r in ['user', 'assistant'] %}<{{ r }}>{% for m in messages if m.role == r %}{{ m.content }} {% endfor %}"
    "{% endfor %}"
)
REPEATS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<again>{{ messages[1].content }}"
SYSTEM_LAST = (
    "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% for m in messages if m.role == 'system' %}<rule>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat(*contents, system=None):
    turns = [{"role": "assistant" if i % 2 else "user", "content": content} for i, content in enumerate(contents)]
    return ([] if system is None else [{"role": "system", "content": system}]) + turns


def learnt(template, messages, tokenizer=None, **fields):
    """Text with labels, a list of its pieces; None: the row is skipped."""
    tokenizer = tokenizer or tiny_tokenizer(template)
    rendered = Renderer(tokenizer, "response")(Row("row", {"messages": messages} | fields), SOURCE)
    if rendered is None:
        return None
    ids, labels = rendered
    assert len(ids) == len(labels)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    pieces, inside = [], False
    for label in labels:
        if label != IGNORED:
            if not inside:
                pieces.append([])
            pieces[-1].append(label)
        inside = label != IGNORED
    return [tokenizer.decode(piece) for piece in pieces]


TWO = chat("FIRST", "one", "SECOND", "two")
