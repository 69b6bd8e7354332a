"""Chat templates as well-known models have them, shortened: a finished conversation does not begin with its prompt."""

USER = "{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}"
TEMPLATES = {
    # the prompt opens the thinking, and a finished turn has lost it
    "DeepSeek-R1-Distill": "{{ bos_token }}{% for m in messages %}"
    + USER
    + "{% elif m.role == 'assistant' %}<|im_start|>{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|><think>\n{% endif %}",
    # thinking is switched by an argument (here on by default), and a finished turn begins with its end
    "DeepSeek-V3": "{% if thinking is not defined %}{% set thinking = true %}{% endif %}{% for m in messages %}"
    + USER
    + "{% elif m.role == 'assistant' %}<|im_start|></think>{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>{{ '<think>' if thinking else '</think>' }}{% endif %}",
    # no end of a turn but the beginning of the next
    "GLM-4.5": "[gMASK]<sop>{% for m in messages %}"
    + USER
    + "{{ '/nothink' if enable_thinking is defined and not enable_thinking }}"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant"
    "{{ '\n<think></think>' if enable_thinking is defined and not enable_thinking }}{% endif %}",
    # opens the thinking unless told otherwise; earlier turns lose it
    "Nemotron-3": "{% set thinks = enable_thinking if enable_thinking is defined else true %}{% for m in messages %}"
    + USER
    + "<|im_end|>\n{% elif m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content if loop.last else "
    "'<think></think>' + m.content.split('</think>')[-1] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{{ '<think>\n' if thinks else '<think></think>' }}{% endif %}",
}
