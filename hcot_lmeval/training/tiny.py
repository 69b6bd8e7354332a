"""A new model, small enough to learn nested arithmetic on a laptop: about 0.6 million parameters.

It may start with the circuit that continues a text as it went on before (Olsson et al. 2022). To copy a definition
out of the prompt takes two layers: heads that know the tokens before, and heads that search the context for a place
with the same tokens before it. Either is useless without the other, which is why gradient descent takes millions of
tokens to find them. A demonstration on a laptop has not the time, and copying is not what it is about. What to search
for, what to do with it, recursion and arithmetic are left to training, which may change these weights too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from hcot_lmeval.embeddings import padded
from hcot_lmeval.markup import Markup, get_markup
from hcot_lmeval.synthetic import ALPHABET
from hcot_lmeval.training.config import TinyConfig

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
BOX = "\\boxed{"
DEVIATION = 0.06
"""Standard deviation of new weights; the usual 0.02 is meant for widths of thousands."""
DEFAULT_SHAPE = TinyConfig()


def tiny_tokenizer(markup: str | Markup = "hcot") -> PreTrainedTokenizerFast:
    r"""Returns a tokenizer for the problems and traces of `hcot_lmeval.synthetic`.

    A token is a character, except that ``\boxed{``, the markers and the thinking tokens are one token each; the last
    two are special tokens.
    """
    markup = get_markup(markup)
    special = [PAD, EOS, UNKNOWN, *markup.markers, *markup.think]
    vocabulary = {word: index for index, word in enumerate([*special, *ALPHABET, BOX])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    # Added tokens, not rules of the pre-tokenizer: AutoTokenizer replaces that by the one of the model's family, which
    # knows neither the box nor, since it works on bytes, any character that is not ASCII.
    added = [BOX, *(character for character in ALPHABET if not character.isascii())]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in added])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=DEFAULT_SHAPE.positions,
        clean_up_tokenization_spaces=False,
    )


def tiny_model(
    tokenizer: PreTrainedTokenizerFast, shape: TinyConfig = DEFAULT_SHAPE, seed: int = 0
) -> Qwen2ForCausalLM:
    """Returns an untrained Qwen2 for `tokenizer`, in float32; the same seed gives the same weights.

    The embedding has a multiple of 64 rows, and the output head shares them.
    """
    config = Qwen2Config(
        vocab_size=padded(len(tokenizer)),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.positions,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        initializer_range=DEVIATION,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
        if shape.start == "induction":
            start_from_induction(model)
    return model


# --- a start that can copy --------------------------------------------------------------------------------------------

LOOK_BACK = (1, 2, 3, 4)
"""Offsets that the first layer's heads look back at. The last operand of a definition stands four tokens behind its
name; without that offset it is guessed whenever two definitions differ in nothing else."""
FAST, SLOW = 0.05, 0.01
"""Angles in radians a token: rotary pairs that turn faster than the first tell neighbours apart, those that turn slower
than the second hardly depend on the place within a few hundred tokens."""


@torch.no_grad()
def start_from_induction(model: Qwen2ForCausalLM) -> None:
    """Gives an untrained model of two layers or more the copying circuit, in place.

    The first layer writes a random code of the token `o` back into a subspace of its own for each offset o; head h of
    the second layer matches the code at offset h (0: the token itself) with the keys' code at offset h + 1. Random
    numbers are drawn from torch's global generator.

    Raises:
        ValueError: the model is too small to hold the circuit.
    """
    config = model.config
    size, hidden = config.head_dim, config.hidden_size
    heads = len(LOOK_BACK)
    if config.num_hidden_layers < 2 or config.num_attention_heads < heads or hidden < heads * size:
        raise ValueError(
            f"start: induction needs 2 layers, {heads} heads and a width of {heads} x head_dim; the model has "
            f"layers={config.num_hidden_layers}, heads={config.num_attention_heads}, hidden_size={hidden}, "
            f"head_dim={size}. Make it larger, or use start: random"
        )
    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    slow = torch.diag((rotary_frequencies(config) < SLOW).float().repeat(2))
    code = slow @ torch.randn(size, hidden) / hidden**0.5
    places = torch.linalg.qr(torch.randn(hidden, hidden))[0].split(size, dim=1)  # orthonormal, [hidden, size] each
    match = 1.2 * slow
    for layer in model.model.layers:  # a quiet start: what is given below is not drowned by random features
        layer.mlp.down_proj.weight.zero_()
        layer.self_attn.o_proj.weight.mul_(0.3)
    look_back(first, rotary_frequencies(config), LOOK_BACK)
    first.o_proj.weight.zero_()
    for head in range(heads):
        rows = slice(head * size, (head + 1) * size)
        first.v_proj.weight[rows] = code
        first.o_proj.weight[:, rows] = 0.15 * places[head]  # about the norm of an embedding
        second.q_proj.weight[rows] = match @ (code if head == 0 else places[head - 1].T)
        second.k_proj.weight[rows] = match @ places[head].T


@torch.no_grad()
def look_back(attention: Any, frequency: torch.Tensor, offsets: Sequence[int], sharpness: float = 8.0) -> None:
    """Sets the query and key biases of an attention layer so that head h attends to the token `offsets[h]` before.

    With constant query q and key k, the rotary score of a token d positions back is ``q . R(-d) k``, which is largest
    at d = o for ``q = R(-o) k``. Slow pairs cannot tell neighbours apart and stay free.

    Args:
        attention: the layer.
        frequency: see `rotary_frequencies`.
        offsets: one for each of the first heads.
        sharpness: how far the score of the offset stands out.
    """
    size = 2 * len(frequency)
    key = sharpness * (frequency > FAST)
    for head, offset in enumerate(offsets):
        rows = slice(head * size, (head + 1) * size)
        turned = torch.cat([key * torch.cos(frequency * offset), -key * torch.sin(frequency * offset)])
        attention.q_proj.bias[rows] = turned
        attention.k_proj.bias[rows] = torch.cat([key, torch.zeros_like(key)])


def rotary_frequencies(config: Any) -> torch.Tensor:
    """Returns the angle in radians by which each pair of a head's dimensions turns per token, [head_dim / 2]."""
    size = config.head_dim
    return float(config.rope_parameters["rope_theta"]) ** (-torch.arange(0, size, 2) / size)
