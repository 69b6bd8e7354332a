"""A model small enough to learn nested arithmetic on a laptop while one waits: about half a million parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from hcot_lmeval.markup import Markup, get_markup
from hcot_lmeval.synthetic import ALPHABET

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
BOX = "\\boxed{"
LAYERS, HIDDEN, INTERMEDIATE = 3, 128, 256
HEADS, SIZE = 6, 32
"""Attention heads of a layer and the dimensions of each: four for `start_from_induction`, two free."""
POSITIONS = 4096
"""Longest context; far beyond what pruned traces of nested arithmetic need, so that the unpruned baseline can run."""
THETA = 1e6
"""Base of the rotary frequencies, as in Qwen2.5."""
LOOK_BACK = (1, 2, 3, 4)
"""Offsets that the first layer's heads look back at initially. The last operand of a definition stands four tokens
behind its name; without that offset it is guessed whenever two definitions differ in nothing else."""


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
    # an added token, not a rule of the pre-tokenizer: AutoTokenizer replaces that by the one of the model's family
    tokenizer.add_tokens([AddedToken(BOX, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def tiny_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Qwen2ForCausalLM:
    """Returns an untrained Qwen2 for `tokenizer`, in float32; the same seed gives the same weights."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=64 * -(-len(tokenizer) // 64),
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=SIZE,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        initializer_range=0.06,  # the usual 0.02 is meant for widths of thousands
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    start_from_induction(model)
    return model


@torch.no_grad()
def start_from_induction(model: Qwen2ForCausalLM) -> None:
    """Gives an untrained model the circuit that continues a text as it went on before, as a starting point.

    To copy a definition out of the prompt takes two layers: heads that know the tokens before (`look_back`), and heads
    that search the context for a place with the same tokens before it. Either is useless without the other, which is
    why gradient descent takes millions of tokens to find them; a demonstration has not the time. What to search for,
    what to do with it, recursion and arithmetic are left to training, which may change these weights too.

    The first layer writes a random code of the token `o` back into a subspace of its own for each offset o; head h of
    the second layer matches the code at offset h (0: the token itself) with the keys' code at offset h + 1.
    """
    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    slow = torch.diag((rotary_frequencies() < 0.01).float().repeat(2))  # a head's dimensions that hardly rotate
    code = slow @ torch.randn(SIZE, HIDDEN) / HIDDEN**0.5
    places = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN))[0].split(SIZE, dim=1)  # orthonormal [HIDDEN, SIZE] each
    match = 1.2 * slow
    for layer in model.model.layers:  # a quiet start: what is given below is not drowned by random features
        layer.mlp.down_proj.weight.zero_()
        layer.self_attn.o_proj.weight.mul_(0.3)
    look_back(first, LOOK_BACK)
    first.o_proj.weight.zero_()
    for head in range(len(LOOK_BACK)):
        rows = slice(head * SIZE, (head + 1) * SIZE)
        first.v_proj.weight[rows] = code
        first.o_proj.weight[:, rows] = 0.15 * places[head]  # about the norm of an embedding
        second.q_proj.weight[rows] = match @ (code if head == 0 else places[head - 1].T)
        second.k_proj.weight[rows] = match @ places[head].T


@torch.no_grad()
def look_back(attention: Any, offsets: Sequence[int], sharpness: float = 8.0) -> None:
    """Sets the query and key biases of an attention layer so that head h attends to the token `offsets[h]` before.

    With constant query q and key k, the rotary score of a token d positions back is ``q . R(-d) k``, which is largest
    at d = o for ``q = R(-o) k``. Only frequencies above 0.05 radians a token tell neighbours apart; the others stay
    free.
    """
    frequency = rotary_frequencies()
    key = sharpness * (frequency > 0.05)
    for head, offset in enumerate(offsets):
        rows = slice(head * SIZE, (head + 1) * SIZE)
        turned = torch.cat([key * torch.cos(frequency * offset), -key * torch.sin(frequency * offset)])
        attention.q_proj.bias[rows] = turned
        attention.k_proj.bias[rows] = torch.cat([key, torch.zeros_like(key)])


def rotary_frequencies() -> torch.Tensor:
    """Returns the angle in radians by which each pair of a head's dimensions turns per token, [SIZE / 2]."""
    return THETA ** (-torch.arange(0, SIZE, 2) / SIZE)
