"""Tokens chosen on the device are those that the host would choose, for every setting side by side."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hcot_lmeval.engine.device.sampling import Sampler, derived_seeds
from hcot_lmeval.engine.device.state import Rule, State
from hcot_lmeval.engine.rows import Request
from hcot_lmeval.engine.sampling import (
    Draw,
    SamplingParams,
    derive_seed,
    hash_places,
    hashed_noise,
    sample,
    signed,
)
from hcot_lmeval.trace import Policy

CPU = torch.device("cpu")
SIZE = 80
ENDS = (2, 0)
SETTINGS = (
    {},
    {"temperature": 1.0},
    {"temperature": 0.6, "top_p": 0.9},
    {"temperature": 1.4, "top_k": 7},
    {"temperature": 0.8, "min_p": 0.05, "top_k": 40, "top_p": 0.7},
    {"min_gen_toks": 3, "max_gen_toks": 9, "stop_ids": ENDS},
    {"temperature": 1.0, "min_gen_toks": 2, "max_gen_toks": 9, "stop_ids": ENDS},
    {"temperature": 2.0, "seed": -5, "top_p": 1e-6},
)


def draws(count: int) -> list[Draw]:
    rows = []
    for i, settings in enumerate(SETTINGS):
        params = SamplingParams(**{"seed": 1000 * i + 2**63, **settings})
        banned = params.stop_ids if count < params.min_gen_toks else ()
        forced = 40 + count if i in (0, 3) and count < 2 else None
        rows.append(Draw(params, derive_seed(params.seed, i), count, banned, forced=forced))
    return rows


def state() -> State:
    rule = Rule(Policy.OFF, None, 100, 100)
    made = State(len(SETTINGS), 100, rule, CPU, ends=3, forced=2)
    for slot, draw in enumerate(draws(0)):
        params, forced = replace(draw.params, max_gen_toks=9), (40, 41) if slot in (0, 3) else ()
        made.begin(slot, Request("", (5,), params, forced_ids=forced), params.stop_ids, sample=slot)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_choices_are_those_of_the_host(dtype):
    rows, on_device, sampler = torch.arange(len(SETTINGS)), state(), Sampler(hash_places(SIZE, CPU))
    generator = torch.Generator().manual_seed(0)
    for count in range(6):
        logits = 3 * torch.randn(len(SETTINGS), SIZE, generator=generator).to(dtype)
        logits[:, list(ENDS)] += 4  # else no ban would show
        expected = [choice.token for choice in sample(logits, draws(count))]
        chosen = sampler.choose(on_device, rows, logits.clone())
        assert chosen.tolist() == expected
        turned = rows.flip(0)
        assert sampler.choose(on_device, turned, logits[turned]).tolist() == expected[::-1]
        on_device.states[:, 5] += 1  # one more token generated


def test_compiled_noise_is_the_same():
    """By the compiler that users have: it once made a loop of it that never ended."""
    torch._dynamo.reset()
    starts, places = torch.tensor([0, 5, -7, 2**62]), hash_places(SIZE, CPU)

    def best(starts: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return hashed_noise(starts, places).argmax(-1)

    assert torch.compile(best, fullgraph=True)(starts, places).tolist() == best(starts, places).tolist()


def test_what_no_request_asks_for_is_left_out():
    def needed(**settings) -> set[str]:
        requests = [Request("r", (1,), SamplingParams(**settings)), Request("s", (1,))]
        found = Sampler.of(requests, SIZE, CPU)
        return {name for name in ("truncates", "bans", "forces") if getattr(found, name)} | (
            set() if found.places is None else {"noise"}
        )

    assert needed() == set()
    assert needed(top_k=3) == set()
    assert needed(temperature=1.0) == {"noise"}
    assert needed(temperature=1.0, min_p=0.1) == {"noise", "truncates"}
    assert needed(min_gen_toks=2) == {"bans"}
    assert Sampler.of([Request("r", (1,), forced_ids=(3,))], SIZE, CPU).forces


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 2**63, 2**64 - 1, -7])
def test_seeds_are_derived_alike(seed):
    indices = torch.tensor([1, 2, 77, 2**40])
    derived = derived_seeds(torch.full((4,), signed(seed)), indices)
    assert derived.tolist() == [signed(derive_seed(seed, int(i))) for i in indices]
