"""Keys and values in a smaller dtype: the engine equals a twin whose keys and values are rounded."""

import pytest
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hcot_lmeval.engine.decoder import Decoder, UnsupportedModelError
from hcot_lmeval.engine.native.step import NativeStep
from hcot_lmeval.engine.slots import KV_DTYPES, KVPool, round_to
from tests.native_cases import STEPS
from tests.reference import POLICIES
from tests.test_engine_exact import FP64, check_all, make_engine, make_model, random_requests, run
from tests.tiny import tiny_model

KINDS = ("qwen2", "qwen3", "llama")


def rounding_twin(kind: str, dtype: torch.dtype):
    """The model with stock attention, to which keys and values go through `dtype`; plain torch, nothing of ours."""
    name = f"sdpa_{str(dtype).removeprefix('torch.')}"

    def attention(module, query, key, value, *args, **kwargs):
        key, value = (x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype).to(x) for x in (key, value))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model = make_model(kind)
    model.set_attn_implementation(name)
    return model


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_the_engine_equals_a_twin_with_rounded_keys_and_values(dtype, kind, policy):
    engine = make_engine(make_model(kind), "hcot", policy, kv_dtype=dtype)
    done, logits = run(engine, random_requests("hcot", 6))
    check_all(rounding_twin(kind, KV_DTYPES[dtype]), done, logits, "hcot", policy, FP64)
    assert policy == "off" or sum(c.statistics.prune_events for c in done.values()) >= 6
    exact = run(make_engine(make_model(kind), "hcot", policy), random_requests("hcot", 6))[1]
    assert any((logits[key] - exact[key]).abs().max() > FP64 for key in logits), "nothing was rounded"


def test_outliers_become_the_largest_number():
    wild = torch.tensor([1e6, -1e6, 1.0, float("nan")])
    assert round_to(wild, torch.float8_e4m3fn).float().tolist()[:3] == [448, -448, 1]
    assert round_to(wild, torch.float16).tolist()[:3] == [65504, -65504, 1]
    assert round_to(wild, torch.float8_e4m3fn).float()[3].isnan()


def test_the_pool_takes_as_much_less_memory():
    plain, half, quarter = (
        Decoder(tiny_model("qwen2"), kv_dtype=dtype).token_bytes for dtype in ("auto", "bfloat16", "float8_e4m3fn")
    )
    assert plain == 2 * half == 4 * quarter


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_steps_with_half_the_cache(kind):
    """A rounded key may fall on the other side of a tie where float32 sums in another order: hence the tolerance."""
    model = tiny_model(kind, initializer_range=0.1)
    decoder = Decoder(model, check=False, compute="torch", kv_dtype="bfloat16")
    plain, native = NativeStep(model), NativeStep(model, torch.bfloat16)
    pools = [KVPool(decoder.layers, 3, 40, poison=True) for _ in range(2)]
    exact = KVPool(Decoder(model).layers, 3, 40, poison=True)
    rounded = 0.0
    for chunks in STEPS:
        with decoder.attached():
            expected = decoder.forward(pools[0], chunks)
        found, unrounded = native.forward(pools[1], chunks), plain.forward(exact, chunks)
        assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()
        rounded = max(rounded, (found - unrounded).abs().max().item())
    assert rounded > 1e-3 * expected.abs().max(), "nothing was rounded"


def test_who_computes_what():
    model = tiny_model("qwen2")
    assert Decoder(model, kv_dtype="bfloat16").compute_name == "native"
    assert Decoder(model, kv_dtype="float8_e4m3fn").compute_name == "torch"
    with pytest.raises(UnsupportedModelError, match="does not combine weights in float32 with a cache in float16"):
        Decoder(model, kv_dtype="float16", compute="native")


def test_what_is_too_coarse_for_a_model_is_said(monkeypatch):
    monkeypatch.setattr("hcot_lmeval.engine.decoder.CHECK_TOLERANCE", {torch.float8_e4m3fn: 1e-9})
    with pytest.raises(UnsupportedModelError, match="kv_dtype='float8_e4m3fn' is too coarse"):
        Decoder(tiny_model("qwen2"), kv_dtype="float8_e4m3fn")
