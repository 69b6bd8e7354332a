"""One step as a program: nothing in it waits for the host, it compiles in one piece, and graphs may fail."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

from hcot_lmeval.engine.decoder import Decoder
from hcot_lmeval.engine.device.attention import Sdpa
from hcot_lmeval.engine.device.choice import TorchFlash
from hcot_lmeval.engine.device.graphs import Runner, bucket
from hcot_lmeval.engine.device.loop import Log, Program, ScratchPool
from hcot_lmeval.engine.device.sampling import Sampler
from hcot_lmeval.engine.device.state import NOTHING, Rule, State
from hcot_lmeval.engine.rows import Request
from hcot_lmeval.engine.sampling import SamplingParams, hash_places
from hcot_lmeval.trace import Policy
from tests.full import FULL, only_in_full
from tests.random_traces import VOCAB_SIZE
from tests.reference import EOS, MARKERS, POLICIES
from tests.test_engine_exact import make_model

CPU = torch.device("cpu")
MARKS = MARKERS["hcot"]
TRACE = (MARKS.open, 20, 21, 22, MARKS.split, 30, 31, MARKS.close, 40, 41, MARKS.open, 42, MARKS.split, MARKS.close)


def make_program(
    kind: str, policy: str, *, slots: int = 3, length: int = 40, device=CPU, model=None, backend=None
) -> Program:
    """Rows whose prompts are one token, so that nothing has to be forwarded before the first step."""
    decoder = Decoder(model or make_model(kind), check=False)
    rule = Rule(Policy(policy), MARKS, 40, 100)
    pool, windows = ScratchPool(decoder.layers, slots, length, poison=True), kind == "gemma2" and policy == "evict"
    state = State(slots, length, rule, device, ends=1, forced=len(TRACE), positions=windows)
    sampler = Sampler(hash_places(VOCAB_SIZE, device))
    program = Program(decoder, pool, state, sampler, backend or Sdpa(), Log(5, slots + 1, device))
    for slot in range(slots):
        drawn = {"temperature": float(slot), "top_p": 0.9, "min_p": 0.05, "top_k": 20, "seed": slot}
        params = SamplingParams(max_gen_toks=30, min_gen_toks=3, **drawn)
        state.begin(slot, Request("", (10 + slot,), params, forced_ids=TRACE), (EOS,))
    return program


def without_values(model: torch.nn.Module, device: torch.device) -> None:
    """Weights of the same shapes there."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                tensors[name] = None if tensor is None else torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def everything(program: Program) -> list[torch.Tensor]:
    """What a step may change, NaN as a number."""
    state, pool = program.state, program.pool
    kept = [state.states, state.ids, state.opens, state.splits, program.log.emitted, program.log.tick]
    return [t.nan_to_num(-7.0) for t in (*kept, *pool.keys.values(), *pool.values.values())]


def reads(traced, *inputs: list[int]) -> set[str]:
    """Operations whose result, or its shape, depends on values that the host would have to wait for."""
    graph = traced(*map(torch.tensor, inputs)).graph
    names = {node.target._opname for node in graph.nodes if hasattr(node.target, "_opname")}
    assert len(graph.nodes) > 3
    return names & {"_local_scalar_dense", "nonzero", "unique", "masked_select"}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_a_step_reads_nothing_back(kind, policy):
    """Traced with tensors that have no values: a branch or a shape that depends on one would raise."""
    careless = make_fx(lambda rows: rows.masked_select(rows > 5) + rows[0].item(), tracing_mode="fake")
    assert reads(careless, [0, 1, 4]) == {"_local_scalar_dense", "masked_select"}
    program = make_program(kind, policy)
    with program.attached():
        traced = make_fx(lambda rows: program.step(rows), tracing_mode="fake", _allow_non_fake_inputs=True)
        assert reads(traced, [2, 0, 3]) == set()


@pytest.mark.parametrize("backend", [Sdpa, TorchFlash])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_a_step_stays_on_its_device(kind, policy, backend):
    """On tensors without values: one made on the CPU by mistake, or a value read, is an error there as on CUDA."""
    device, model = torch.device("meta"), make_model(kind, torch.bfloat16)
    without_values(model, device)
    program = make_program(kind, policy, device=device, model=model, backend=backend())
    with program.attached():
        program.step(torch.zeros(4, dtype=torch.int64, device=device))
        program.offer(torch.zeros(2, dtype=torch.int64, device=device), torch.zeros(2, VOCAB_SIZE, device=device))
        with pytest.raises(RuntimeError):
            program.step(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(RuntimeError):
        bool(program.log.tick > 0)


def test_sizes_beyond_what_torch_compiles_by_itself():
    """It gives up at the 9th form of one function, with an error if the function has to be one piece."""
    total = torch.zeros((), dtype=torch.int64)

    def step(rows: torch.Tensor) -> None:
        total.add_(rows.sum())

    settings = {"counter": total, "graphs": False, "compiled": True, "backend": "eager"}
    runner = Runner(step, 128, 0, CPU, **settings)
    for rows in range(128, 0, -8):
        runner.load([1] * rows)
        runner.run()
    assert total == sum(range(128, 0, -8))


KINDS = ("qwen2", "qwen3", "llama")
PAIRS = [(kind, policy) for kind in KINDS for policy in POLICIES]
QUICK_PAIRS = [("qwen2", "evict"), ("qwen3", "recompute"), ("llama", "off")]


@pytest.mark.parametrize(("kind", "policy"), PAIRS if FULL else QUICK_PAIRS)
def test_a_compiled_step_is_one_graph_and_the_same_step(kind, policy):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager" if policy != "recompute" else "aot_eager")
    plain, compiled = make_program(kind, policy), make_program(kind, policy)
    rows = torch.tensor([1, 0, 2, 3])
    runners = [
        Runner(p.step, 4, 3, CPU, counter=p.log.tick, graphs=False, compiled=p is compiled, backend=counter)
        for p in (plain, compiled)
    ]
    for program, runner in zip((plain, compiled), runners, strict=True):
        with program.attached():
            runner.load(rows.tolist())
            for _ in range(12):
                runner.run()
    assert counter.frame_count == 1
    for a, b in zip(everything(plain), everything(compiled), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)
    assert plain.state.states[:3, 5].min() > 3  # so many tokens were generated


class Blind(Sdpa):
    """Reads what was written and takes no memory, so that what a step allocates is not its doing."""

    def decode(self, query, keys, values, at, scores):
        return query + keys.flatten(0, 1)[at.starts[:-1]].sum() + values.flatten(0, 1)[at.starts[:-1]].sum()


def largest_allocation(backend: Sdpa) -> tuple[int, int]:
    """The largest allocation of a compiled forward of one token a row, and the size of one layer's keys, in bytes."""
    torch._dynamo.reset()
    program = make_program("qwen2", "recompute", length=4000, backend=backend)
    forward = torch.compile(program.logits, fullgraph=True, dynamic=False)
    rows = torch.tensor([2, 0, 1, 3])
    with torch.no_grad(), program.attached():
        forward(rows)
        with torch.profiler.profile(profile_memory=True) as profile:
            forward(rows)
    assert not program.pool.keys[0][:3, 0].isnan().any()  # it has written
    events = profile.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]"), program.pool.keys[0].nbytes


@only_in_full  # it compiles C++ for more than a minute
def test_a_compiled_forward_copies_no_slots():
    """By the compiler that users have, which may write in place only where it is sure that nobody sees it."""
    largest, keys = largest_allocation(Blind())
    assert 0 < largest < keys / 100
    largest, keys = largest_allocation(Sdpa())
    assert largest >= keys  # so it would be noticed


def test_sizes_of_batches():
    sizes = [1, 2, 4, 4, 8, 8, 8, 8, 16, 16, 16, 16, 16, 16, 16, 16, 32]
    assert [bucket(n) for n in range(1, 18)] == sizes
    assert bucket(64) == 64 and bucket(65) == 80


def test_without_graphs_the_steps_go_on_and_say_why(caplog):
    """A capture fails here, since there is no GPU. It must have changed nothing."""
    program, twin = make_program("qwen2", "recompute"), make_program("qwen2", "recompute")
    for p, graphs in ((program, True), (twin, False)):
        runner = Runner(p.step, 3, 3, CPU, counter=p.log.tick, graphs=graphs)
        with p.attached(), caplog.at_level(logging.WARNING):
            runner.load([0, 2, 1])
            for _ in range(3):
                runner.run()
        assert runner.captured == ()
    assert caplog.text.count("no CUDA graphs") == 1
    for a, b in zip(everything(program), everything(twin), strict=True):
        assert torch.equal(a, b)


class StandIn:
    """`torch.cuda` as far as captures need it; writes down what happens, and fails a capture if it is told to."""

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.mode, self.on = fails, 0, "main"
        self.seen: list[str] = []

    def install(self, monkeypatch) -> None:
        names = "Stream current_stream stream CUDAGraph graph get_sync_debug_mode set_sync_debug_mode"
        for name in names.split():
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def Stream(self, device):
        return self._stream("aside")

    def current_stream(self, device):
        return self._stream(self.on)

    def _stream(self, name: str):
        return SimpleNamespace(name=name, device=CPU, wait_stream=lambda other: self.seen.append(f"wait {other.name}"))

    @contextmanager
    def stream(self, stream):
        before, self.on = self.on, stream.name
        try:
            yield
        finally:
            self.on = before

    @contextmanager
    def graph(self, graph, *, pool, stream, capture_error_mode):
        self.seen.append(f"capture in {pool}")
        self.on = stream.name
        if self.fails:
            raise RuntimeError("not permitted when stream is capturing")  # and the stream stays, as with PyTorch's own
        yield
        self.on = "main"

    def CUDAGraph(self):
        return SimpleNamespace(pool=lambda: "pool", replay=lambda: self.seen.append("replay"))

    def get_sync_debug_mode(self):
        return self.mode

    def set_sync_debug_mode(self, mode):
        self.mode = mode


@pytest.mark.parametrize("fails", [False, True])
def test_a_capture_in_the_order_that_cuda_wants(fails, monkeypatch, caplog):
    """On a stand-in: warm-up aside, the last run with waits forbidden, then the capture; all put back afterwards."""
    cuda = StandIn(fails)
    cuda.install(monkeypatch)

    def step(rows: torch.Tensor) -> None:
        cuda.seen.append(f"step of {len(rows)} on {cuda.on}{', no waiting' if cuda.mode else ''}")

    runner = Runner(step, 3, 9, CPU, counter=torch.zeros(1), graphs=True)
    for rows in ([0, 1, 2], [0, 1]):
        runner.load(rows)
        runner.run()

    def warm_up(size: int) -> list[str]:
        step = f"step of {size} on aside"
        return ["wait main", step, step, f"{step}, no waiting", "wait aside"]

    if fails:
        assert cuda.seen == [*warm_up(4), "capture in None", "step of 4 on main", "step of 2 on main"]
        assert "not permitted" in caplog.text and runner.captured == ()
    else:
        first = [*warm_up(4), "capture in None", "step of 4 on aside", "replay"]
        assert cuda.seen == [*first, *warm_up(2), "capture in pool", "step of 2 on aside", "replay"]
        assert runner.captured == (4, 2)
    assert (cuda.mode, cuda.on) == (0, "main")


def test_a_batch_that_empties_is_captured_at_every_halving(monkeypatch):
    StandIn().install(monkeypatch)
    sizes: list[int] = []
    runner = Runner(lambda rows: sizes.append(len(rows)), 100, 0, CPU, counter=torch.zeros(1), graphs=True)
    for rows in range(100, 0, -1):
        runner.load([1] * rows)
        runner.run()
        assert rows <= runner.size <= max(2 * rows + 16, 1)
    assert runner.captured == (112, 48, 16, 8, 4, 2, 1)
    runner.load([1] * 90)
    runner.run()
    assert runner.size == 112 and len(sizes) == 7 * 4


def test_warming_up_moves_no_row(monkeypatch):
    """What is captured runs over padding alone: but for the log's next lines, everything stays as it was."""
    program = make_program("llama", "evict")
    runner = Runner(program.step, 3, 3, CPU, counter=program.log.tick, graphs=True)
    warmed = []

    def warm_up(rows: torch.Tensor) -> None:
        warmed.append(rows.tolist())
        for _ in range(3):
            program.step(rows)
        raise RuntimeError("nothing to capture on")

    monkeypatch.setattr(runner, "record", warm_up)
    before = everything(program)
    with program.attached():
        runner.load([0, 1, 2])
        runner.capture()
    assert warmed == [[3] * 4]
    places = [t[:, :-1] if t.dim() == 4 else t[:3] if t.dim() == 2 else t for t in everything(program)]
    expected = [t[:, :-1] if t.dim() == 4 else t[:3] if t.dim() == 2 else t for t in before]
    for i, (a, b) in enumerate(zip(places, expected, strict=True)):
        assert torch.equal(a, b) or i == 4, i


def test_lines_of_the_log_come_once_and_in_order():
    log = Log(4, 3, CPU)
    for step in range(3):
        log.write(torch.tensor([step % 2]), torch.tensor([100 + step]))
    log.copy(0, 2)
    log.copy(2, 1)
    assert log.read(1) == [[100, NOTHING, NOTHING], [NOTHING, 101, NOTHING]]
    for step in range(3, 6):
        log.write(torch.tensor([1, 0]), torch.tensor([100 + step, 50]))
    log.copy(3, 3)
    assert [line[1] for line in log.read(0)] == [NOTHING, 103, 104, 105]
    assert log.read(0) == []


def test_what_layers_need_is_found_by_one_token():
    layers = Decoder(make_model("gemma2"), check=False).layers.values()
    assert {(x.query_heads, x.heads, x.key_dim, x.value_dim, x.softcap) for x in layers} == {(4, 2, 8, 8, 50.0)}
    assert {x.window for x in layers} == {16, None}
