"""Chat templates of the kinds that checkpoints have, written for these tests."""

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|header|>' + message['role'] + '<|/header|>\n\n' "
    "+ message['content'] | trim + '<|im_end|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\n\n' }}{% endif %}"
)
#: closes the last turn only if another one follows
OPEN_ENDED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
    "+ message['content'] }}{% if (loop.last and add_generation_prompt) or not loop.last %}"
    "{{ '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] | trim + ' ' + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles!') }}{% endif %}{% endfor %}"
)
#: takes thoughts out of earlier answers
THINKING = """
{%- macro visible(content) -%}
    {%- if content is string -%}{{- content -}}
    {%- elif content is iterable and content is not mapping -%}
        {%- for item in content -%}
            {%- if item is mapping and item.type == 'text' -%}{{- item.text -}}
            {%- elif item is string -%}{{- item -}}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{- content -}}{%- endif -%}
{%- endmacro -%}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}{{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages %}
    {%- set content = visible(message.content) %}
    {%- if message.role == "user" and not(content.startswith('<tool_response>')
          and content.endswith('</tool_response>')) %}
        {%- set ns.last = loop.index0 %}
    {%- endif %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' }}
        {%- if loop.last and reasoning %}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content.lstrip('\\n') }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function if call.function else call %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- call.name }}{{- '", "arguments": ' }}
            {%- if call.arguments is string %}{{- call.arguments }}
            {%- else %}{{- call.arguments | tojson }}{%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + content }}
        {{- '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{%- generation %}{{ m.content }}<|im_end|>{% set x = 1 %}{% endgeneration -%}{{ x }}"
    "{% else %}<|im_start|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
ODDS = {
    "given": "{{ tools is none }} {{ documents is none }} {{ tools is defined }} {{ nothing }}|",
    "nothing": "{{ nothing is defined }}{{ messages[0].nothing }}{{ nothing or 'default' }}",
    "names": "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ sep_token }}|{{ pad_token }}|"
    "{{ cls_token }}|{{ mask_token }}|{{ image_token }}|{{ add_bos_token }}|{{ own_token }}",
    "names defined": "{{ bos_token is defined }}{{ unk_token is defined }}{{ eos_token is none }}",
    "json": "{{ messages | tojson }}{{ ['é', '<', 1.5, none] | tojson(indent=2) }}"
    "{{ {'b': '€', 'a': [1]} | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}",
    "blocks": "a\n  {% if true %}\n  b\n  {% endif %}\n  c\n\n{#- no -#}\n d {{- ' e' }}\n",
    "loops": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{% if m.role == 'assistant' %}{% continue %}{% endif %}{{ m.role }},{% endfor %}",
    "day": "{{ strftime_now('%Y-%m') }}{{ strftime_now is defined }}",
    "joins": "{{ messages[0].role ~ 1 ~ none ~ messages[0].content }}{{ ['a', 'b'] | join('-') }}",
    "sets": "{% set text %}[{{ messages[0].content }}]{% endset %}{{ text | upper }}"
    "{{ text[1:3] }}",
    "calls": "{{ messages[0].content.split(' ') | first }}{{ '%s!' | format(messages[0].content) }}"
    "{{ messages[0].content.replace('l', 'L') }}{{ messages[0].items() | list | length }}",
    "keys": "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}",
    "thoughts": "{{ messages[1].reasoning_content }}|{{ messages[1].thinking }}|"
    "{{ messages[1].x }}",
    "fails": "{{ messages[99].role.deeper }}",
    "refuses": "{{ raise_exception('never ' + messages[0].role) }}",
}
TEMPLATES = {
    "chatml": CHATML,
    "headers": HEADERS,
    "open ended": OPEN_ENDED,
    "brackets": BRACKETS,
    "thinking": THINKING,
    "generation": GENERATION,
    **ODDS,
}
