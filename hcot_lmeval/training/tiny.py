"""A new model, small enough to learn nested arithmetic on a laptop: about 0.6 million parameters."""

from __future__ import annotations

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from hcot_lmeval.embeddings import padded
from hcot_lmeval.markup import Markup, get_markup
from hcot_lmeval.synthetic import ALPHABET
from hcot_lmeval.training.config import TinyConfig
from hcot_lmeval.training.induction import start_from_induction

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
