"""vLLM, offline, which prunes nothing."""

from __future__ import annotations

import tempfile
import time
from importlib import import_module
from importlib.util import find_spec

from bench.engines import Contender, Setting, UnavailableError
from bench.timing import Timing

MEMORY_SHARE = 0.5
"""Part of the GPU's memory for it; the model of the other engines is there too."""


class Vllm(Contender):
    """One call of `LLM.generate` for all rows.

    It generates tokens of its own, as many as the script has: what a token is does not change the work of an engine
    that prunes nothing. It does not tell the times of its steps.
    """

    forced = False

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        if find_spec("vllm") is None:
            raise UnavailableError("not installed; pip install vllm")
        if setting.model.device.type != "cuda":
            raise UnavailableError("needs --device cuda")
        vllm, work, sampling = import_module("vllm"), setting.work, setting.sampling
        self._folder = tempfile.TemporaryDirectory()
        setting.model.save_pretrained(self._folder.name)
        self._llm = vllm.LLM(
            self._folder.name,
            skip_tokenizer_init=True,
            dtype=str(setting.model.dtype).removeprefix("torch."),
            max_model_len=work.prompt + work.tokens,
            max_num_seqs=work.batch,
            gpu_memory_utilization=MEMORY_SHARE,
            enable_prefix_caching=False,
        )
        self._params = vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            max_tokens=work.tokens,
            ignore_eos=True,
            detokenize=False,
        )

    def run(self) -> Timing:
        work = self.setting.work
        prompts = [{"prompt_token_ids": list(prompt)} for prompt in work.prompts]
        start = time.perf_counter()
        outputs = self._llm.generate(prompts, self._params, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = tuple(tuple(output.outputs[0].token_ids) for output in outputs)
        return Timing(seconds, tokens, work.prompt + work.tokens)

    def close(self) -> None:
        del self._llm
        self._folder.cleanup()
