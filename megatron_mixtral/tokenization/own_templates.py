"""Mistral's own forms as Jinja, for the folders that go with trained weights: transformers then asks as was learnt.

Tokenizers differ in whether they put a space after a control token, so each form has a text for either kind.
"""

from megatron_mixtral.tokenization import chat
from megatron_mixtral.tokenization.chat_template import Template
from megatron_mixtral.tokenization.settings import DEFAULT
from megatron_mixtral.tokenization.tokenizer import Tokenizer

_SYSTEM = (
    "{% set ns = namespace(system='', last=-1, role='') %}{% for message in messages %}"
    "{% if message.role == 'system' %}{% set ns.system = ns.system ~ message.content ~ '\\n\\n' %}"
    "{% elif message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
)
_ALTERNATE = (
    "{% if message.role == ns.role and message.role != 'tool' %}"
    "{{ raise_exception('messages must alternate: user, assistant, user, ...') }}{% endif %}"
    "{% set ns.role = message.role %}"
)
_V1 = (
    "{{ bos_token }}"
    + _SYSTEM
    + "{% for message in messages if message.role != 'system' %}"
    + _ALTERNATE
    + "{% if message.role == 'user' %}"
    "{{ 'LEAD[INST] ' ~ (ns.system if loop.first else '') ~ message.content ~ ' [/INST]' }}"
    "{% elif message.role == 'assistant' %}{{ ' ' ~ message.content ~ eos_token }}"
    "{% else %}{{ raise_exception('Mixtral knows the roles system, user and assistant') }}{% endif %}{% endfor %}"
)
_V3 = (
    "{{ bos_token }}"
    + _SYSTEM
    + "{% for message in messages %}{% if message.role != 'system' %}"
    + _ALTERNATE
    + "{% endif %}"
    "{% if message.role == 'user' %}{% if tools and loop.index0 == ns.last %}"
    "{{ '[AVAILABLE_TOOLS]LEAD[' }}{% for tool in tools %}{% set f = tool.function %}"
    '{{ \'{"type": "function", "function": {"name": \' ~ f.name | tojson }}'
    "{{ ', \"description\": ' ~ (f.description or '') | tojson }}"
    "{{ ', \"parameters\": ' ~ (f.parameters or {}) | tojson ~ '}}' ~ ('' if loop.last else ', ') }}"
    "{% endfor %}{{ '][/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST]LEAD' ~ (ns.system if loop.index0 == ns.last else '') ~ message.content ~ '[/INST]' }}"
    "{% elif message.role == 'assistant' and message.tool_calls %}{{ '[TOOL_CALLS]LEAD[' }}"
    "{% for call in message.tool_calls %}{% set f = call.function %}"
    "{{ '{\"name\": ' ~ f.name | tojson ~ ', \"arguments\": ' }}"
    "{{ f.arguments if f.arguments is string else f.arguments | tojson }}"
    "{{ ', \"id\": ' ~ call.id | tojson if call.id and call.id != 'null' else '' }}"
    "{{ '}' ~ ('' if loop.last else ', ') }}"
    "{% endfor %}{{ ']' ~ eos_token }}"
    "{% elif message.role == 'assistant' %}{{ 'LEAD' ~ message.content.rstrip(' ') ~ eos_token }}"
    "{% elif message.role == 'tool' %}{{ '[TOOL_RESULTS]LEAD{\"content\": ' ~ message.content | tojson"
    " ~ ', \"call_id\": ' ~ message.tool_call_id | tojson ~ '}[/TOOL_RESULTS]' }}{% endif %}{% endfor %}"
)
_TALK = [("system", "s p"), ("user", "a q"), ("assistant", "b r"), ("user", "c"), ("assistant", "d")]
TALK = [{"role": role, "content": content} for role, content in _TALK]


def source(words: Tokenizer) -> str | None:
    """The template by which transformers writes Mistral's own form with this tokenizer; None where none does."""
    form = chat.own(words)
    text = _V3 if chat.is_v3(words) else _V1
    made = [text.replace("LEAD", lead) for lead in ("", " ")]
    return next((one for one in made if writes(one, words, form)), None)


def writes(template: str, words: Tokenizer, form: chat.Form) -> bool:
    """Whether transformers gets the ids of `form` by `template`."""
    for talk in (TALK, TALK[1:]):
        try:
            if Template({DEFAULT: template}, words, where="").example(talk)[0] != form.example(talk)[0]:
                return False
        except ValueError:
            if talk is not TALK:  # one that refuses the system's words writes nothing wrong
                return False
    return True
