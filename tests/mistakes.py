"""The table of `test_mistakes.py`: what was typed, how it ends, and which words must be in the line that says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from hcot_lmeval.assets import ROOT as BUNDLED_MODELS
from tests.result_files import build_run


class Mistake(NamedTuple):
    """A command line and its end.

    Attributes:
        line: as a shell has it; {files} is the folder of `write_files`, {out} a new folder, {root} the checkout.
        words: that the last line must hold.
        stage: how far it came: ``arguments``, before weights are loaded; ``loading``; ``generation``.
        code: its exit status.
    """

    line: str
    words: tuple[str, ...]
    stage: str = "arguments"
    code: int = 1


RUN = "lm_eval --model hcot --tasks hcot_arith --limit 1 --model_args "


def arguments(given: str, *words: str, stage: str = "arguments", more: str = "") -> Mistake:
    """A mistake among the model's arguments."""
    given = given if given.startswith("pretrained") else f"pretrained=tiny-hcot,{given}"
    return Mistake(f"{RUN}{given} {more}".strip(), words, stage)


def sampling(given: str, *words: str, stage: str = "arguments") -> Mistake:
    """A mistake among the generation kwargs."""
    return Mistake(f"{RUN}pretrained=tiny-hcot,journal=off --gen_kwargs {given}", words, stage)


MODEL_ARGUMENTS = [
    arguments("max_contxt=256", "'max_contxt' is unknown", "did you mean max_context?"),
    arguments("prunning=off", "'prunning' is unknown", "did you mean pruning?"),
    arguments("pruning=never", "pruning='never'", "off, recompute, evict"),
    arguments("pruning=Recompute", "pruning='Recompute'", "recompute"),
    arguments("markup=xml", "'xml'", "hcot", "pencil", "memento"),
    arguments("any_policy=maybe", "any_policy='maybe'", "true or false"),
    arguments("ablation=keep", "ablation", "keep_last:N"),
    arguments("ablation=keep_last:x", "ablation", "keep_last"),
    arguments("max_context=0", "max_context=0", "from 1 up"),
    arguments("max_context=-5", "max_context=-5", "from 1 up"),
    arguments("max_context=many", "max_context='many'", "whole number"),
    arguments("max_context=2.5", "max_context=2.5", "whole number"),
    arguments("max_gen_toks=0", "max_gen_toks=0", "from 1 up"),
    arguments("seed=abc", "seed='abc'", "whole number"),
    arguments("seed=1.5", "seed=1.5", "whole number"),
    arguments("prompt_markers=yes", "prompt_markers='yes'", "text, tokens, acting"),
    arguments("apply_chat_template=perhaps", "apply_chat_template='perhaps'", "auto, true, false"),
    arguments("enable_thinking=maybe", "enable_thinking='maybe'"),
    arguments("constraints=json", "constraints='json'", "grammar"),
    arguments("max_depth=0", "max_depth=0"),
    arguments("max_depth=two", "max_depth='two'"),
    arguments("max_block_tokens=-1", "max_block_tokens=-1"),
    arguments("max_solution_tokens=0", "max_solution_tokens=0"),
    arguments("force_answer=0", "force_answer=0"),
    arguments("force_answer=x", "force_answer='x'"),
    arguments("closing_tokens=-1", "closing_tokens=-1"),
    arguments("loop_tokens=1.5", "loop_tokens=1.5"),
    arguments("closing_tokens=4", "closing_tokens=4 does nothing", "force_answer"),
    arguments("max_length=64,max_context=128", "max_length=64 does nothing", "max_context=128"),
    arguments("dtype=float32,torch_dtype=bfloat16", "torch_dtype='bfloat16' does nothing", "dtype='float32'"),
    arguments("run_ahead=4", "run_ahead=4", "does nothing on the CPU", more="--device cpu"),
    arguments("attention=sdpa,loop=host", "attention='sdpa'", "loop='host'"),
    arguments("compiled=true", "compiled=True", "does nothing on the CPU", more="--device cpu"),
    arguments("chat_template_args=short", "chat_template_args='short'", "give a mapping"),
    arguments("compute=cuda", "compute='cuda'", "auto, native, torch"),
    arguments("kv_dtype=int4", "kv_dtype='int4'", "bfloat16"),
    arguments("weights=small", "weights='small'", "auto, plain, packed"),
    arguments("weights=packed,compute=torch", "weights='packed'", "compute='torch'"),
    arguments("huge_pages=perhaps", "huge_pages='perhaps'"),
    arguments("loop=fast", "loop='fast'"),
    arguments("attention=flash3", "attention='flash3'"),
    arguments("graphs=perhaps", "graphs='perhaps'"),
    arguments("run_ahead=0", "run_ahead=0"),
    arguments("slots=4", "'slots' is unknown", "--batch_size"),
    arguments("eos_token_id=20", "eos_token_id=20 is not supported", "until=TEXT"),
    arguments("pad_token_id=0", "pad_token_id=0 is not supported"),
    arguments("revision=v2", "revision='v2'", "tiny-hcot is here"),
    arguments("truncation=true", "truncation=True is not supported", "raise max_context"),
    arguments("backend=seq2seq", "backend='seq2seq' is not supported"),
    arguments("journal={files}/a_file", "journal=", "is a file", "'off'"),
    arguments("notes={files}/a_file", "notes=", "is a file"),
    arguments("journal=/proc/nowhere", "journal=/proc/nowhere cannot be written to", "journal=off"),
    arguments("notes=/proc/nowhere", "notes=/proc/nowhere cannot be written to", "notes=DIR"),
    arguments("journal={files}/a_file/below", "journal=", "cannot be written to", "journal=off"),
    arguments("dtype=bf16", "dtype='bf16'", "did you mean bfloat16?"),
    arguments("dtype=fp16", "dtype='fp16'", "did you mean float16?"),
    arguments("dtype=half-precision", "dtype='half-precision'", "float32"),
    arguments("device=cuda:0", "device='cuda:0' stands against --device 'cpu'", more="--device cpu"),
    arguments("batch_size=4", "batch_size=4 stands against --batch_size"),
    arguments("pruning=off", "batch_size='many'", "'auto'", more="--batch_size many"),
    arguments("pruning=off", "batch_size='0'", "1 or more", more="--batch_size 0"),
    arguments("force_answer=300,max_context=128", "force_answer=300", "max_context=128"),
    arguments("markup=5", "'5'", "hcot", "pencil", "memento"),
    arguments("journal=true", "journal=True", "'off'"),
    arguments("trust_remote_code=maybe", "trust_remote_code='maybe'", "true, false"),
    arguments("parallelize=perhaps", "parallelize='perhaps'", "true, false"),
    arguments("dtype=int8", "dtype='int8'", "float32"),
    arguments("dtype=5", "dtype='5'", "float32"),
    arguments("tokenizer=7", "tokenizer=7", "written as text"),
    arguments("pretrained=tiny-hcott", "pretrained='tiny-hcott'", "did you mean tiny-hcot?"),
    arguments("pretrained=123", "pretrained=123", "./123"),
    arguments("pruning=off", "device='cuda:99'", "cpu", more="--device cuda:99"),
    arguments("pruning=off", "device='gpu'", "cpu", more="--device gpu"),
    arguments("'max context=256'", "'max context' is unknown", "did you mean max_context?"),
    arguments("tie_word_embeddings=False", "lm_head.weight", "random", stage="loading"),
    arguments("hidden_size=32", "other sizes than its configuration", stage="loading"),
    arguments("think_end_token=</thnk>", "think_end_token", "'</thnk>'", "</think>", stage="loading"),
    arguments("pruning=evict", "trained under policy recompute", "any_policy", stage="loading"),
    arguments("markup=pencil", "hcot", stage="loading"),
]
PLACES = [
    arguments("pretrained=/nope", "pretrained='/nope'", "is no directory"),
    arguments("pretrained=./nope", "pretrained='./nope'", "is no directory"),
    arguments("pretrained=~/nope/nope", "pretrained=", "nope/nope", "is no directory"),
    arguments("pretrained=tiny_hcot", "pretrained='tiny_hcot'", "did you mean tiny-hcot?"),
    arguments("pretrained={files}/a_file", "pretrained=", "is no directory"),
    arguments("pretrained={files}/empty", "pretrained=", "holds no config.json"),
    arguments("pretrained={files}/no_tokenizer", "pretrained=", "holds no tokenizer", "tokenizer=DIR"),
    arguments("pretrained={files}/no_config", "pretrained=", "holds no config.json"),
    arguments(
        "pretrained={files}/no_weights", "pretrained=", "could not be loaded", "model.safetensors", stage="loading"
    ),
    arguments("pretrained={files}/pointer", "pointer/model.safetensors is a pointer of Git LFS", stage="loading"),
    arguments("pretrained={files}/damaged", "damaged/model.safetensors is damaged", stage="loading"),
    arguments("pretrained={files}/bad_config", "bad_config/config.json"),
    arguments("pretrained={files}/bad_tokenizer", "bad_tokenizer/tokenizer.json"),
    arguments("tokenizer=/nope", "tokenizer='/nope' is no directory"),
    arguments("tokenizer={files}/empty", "tokenizer=", "holds no tokenizer"),
    arguments("peft=/nope", "peft='/nope' is no directory"),
    arguments("peft={files}/empty", "peft=", "holds no adapter_config.json"),
    arguments("delta=/nope", "delta='/nope' is no directory"),
    arguments("tokenizer={files}/larger_tokenizer", "id", "embedding", stage="loading"),
    arguments("pretrained={files}/unmarked", "markers", "pruning=off", stage="loading"),
    arguments("revision=nope,pretrained=org/model", "pretrained='org/model' could not be loaded"),
]
GENERATION = [
    sampling("num_beams=10", "num_beams=10", "beam search is not supported"),
    sampling("stop=x", "'stop' is unknown", "did you mean until?"),
    sampling("max_length=10", "'max_length' is unknown", "did you mean max_gen_toks?"),
    sampling("temprature=0.5", "'temprature' is unknown", "did you mean temperature?"),
    sampling("temperature=hot", "temperature='hot' is not a number"),
    sampling("temperature=-1", "temperature=-1"),
    sampling("temperature=0,do_sample=True", "do_sample=True needs a temperature above 0"),
    sampling("do_sample=perhaps", "do_sample='perhaps'", "true, false"),
    sampling("top_p=1.5", "top_p=1.5"),
    sampling("top_p=0", "top_p=0"),
    sampling("top_k=2.5", "top_k=2.5", "whole number"),
    sampling("min_p=2", "min_p=2"),
    sampling("repetition_penalty=0", "repetition_penalty=0"),
    sampling("max_gen_toks=0", "max_gen_toks=0"),
    sampling("max_gen_toks=20.5", "max_gen_toks=20.5", "whole number"),
    sampling("max_gen_toks=-3", "max_gen_toks=-3"),
    sampling("min_gen_toks=-3", "min_gen_toks=-3"),
    sampling("max_gen_toks=10,min_gen_toks=20", "min_gen_toks", "20"),
    sampling("seed=abc", "seed='abc'", "whole number"),
    sampling("until=5", "until=5", "string"),
]
SOME = "lm_eval --model hcot --tasks hcot_arith --model_args pretrained=tiny-hcot --samples "
RUNS = [
    Mistake(f"{RUN}pretrained=tiny-hcot --output_path /proc/nope", ("output_path=/proc/nope", "--output_path DIR")),
    Mistake(f"{RUN}pretrained=tiny-hcot --output_path {{files}}/a_file", ("output_path=", "cannot be written to")),
    Mistake(f"{RUN}pretrained={{files}}/{'x' * 250} --output_path {{out}}", ("bytes", "shorter path")),
    Mistake(f"{RUN}pretrained=tiny-hcot --metadata repeat=3", ("'repeat'", "did you mean repeats?")),
    Mistake(f"{RUN}pretrained=tiny-hcot --metadata problem_sed=3", ("'problem_sed'", "did you mean problem_seed?")),
    Mistake(f"{RUN}pretrained=tiny-hcot --metadata size=0", ("size=0", "1 or more"), "loading"),
    Mistake(f"{RUN}pretrained=tiny-hcot --metadata size=many", ("size='many'", "number of problems"), "loading"),
    Mistake(f"{RUN}pretrained=tiny-hcot --limit 0", ("limit=0", "no documents")),
    Mistake(f"{RUN}pretrained=tiny-hcot --limit -1", ("limit=-1", "no documents")),
    Mistake(f"{RUN}pretrained=tiny-hcot --apply_chat_template", ("chat template cannot be applied",), "loading"),
    Mistake(f"{SOME}'{{{{\"hcot_arit\": [1]}}}}'", ("'hcot_arit'", "did you mean hcot_arith?")),
    Mistake(f"{SOME}'{{{{\"hcot_arith\": [-1]}}}}'", ("[-1]", "counted from 0")),
    Mistake(f"{RUN}pretrained=tiny-hcot --use_cache {{out}}/cache", ("use_cache", "journal")),
    Mistake(f"{RUN}pretrained=tiny-hcot,apply_chat_template=true", ("no chat template", "auto or false"), "loading"),
]
OWN = "lm_eval --model hcot --include_path {files}/tasks --model_args pretrained=tiny-hcot,journal=off --tasks "
OWN_TASKS = [
    Mistake(f"{OWN}no_answer", ("task no_answer: no field named 'answer'", "tasks/README.md"), "loading"),
    Mistake(f"{OWN}no_answer_function", ("task no_answer_function: no field named 'answer'",), "loading"),
    Mistake(f"{OWN}not_filtered", ("task not_filtered", "take_first_k", "SampledTask"), "loading"),
    Mistake(f"{OWN}no_level", ("task no_level", "'level'"), "loading"),
    Mistake(f"{OWN}one_response --metadata repeats=2", ("repeats=2", "does nothing in one_response"), "loading"),
    Mistake(f"{OWN}no_repeats", ("repeats=0", "a positive integer"), "loading"),
]
COMPARE = [
    Mistake("compare read", ("arguments are required",), code=2),
    Mistake("compare read {files}/nope", ("nope",)),
    Mistake("compare read {files}/empty", ("no run below", "--output_path")),
    Mistake("compare read {files}/torn", ("torn",)),
    Mistake("compare red", ("invalid choice", "read"), code=2),
    Mistake("compare run --tasks hcot_arith --windows 128 --out {out}", ("models", "required")),
    Mistake(
        "compare run --models tiny-hcot --tasks hcot_arith --windows many --out {out}", ("windows", "integer", "many")
    ),
]
COMMANDS = [
    Mistake("train sft {files}/nope.yaml", ("nope.yaml", "is no file")),
    Mistake("train sft {files}/list.yaml", ("list.yaml", "keys and values")),
    Mistake("train sft {files}/broken.yaml", ("broken.yaml", "is not YAML")),
    Mistake("train sft {files}/unknown.yaml", ("learning_rat", "did you mean learning_rate?")),
    Mistake(
        "train sft {root}/scripts/configs/first.yaml --override phases.0.policy=evct", ("phases.0.policy", "evict")
    ),
    Mistake(
        "train sft {root}/scripts/configs/first.yaml --override phases.0.steps=on",
        ("steps=True is not allowed", "a number is needed"),
    ),
    Mistake("train sft {root}/scripts/configs/first.yaml --override modle=x", ("modle", "did you mean model?")),
    Mistake("train sft {root}/scripts/configs/first.yaml --override phases", ("key=value",)),
    Mistake(
        "train sft {root}/scripts/configs/first.yaml --override model=tiny-hcot revision=v2",
        ("revision=v2", "tiny-hcot is here"),
    ),
    Mistake("train stf x.yaml", ("invalid choice", "sft"), code=2),
    Mistake("view {files}/nope --out {out}.html", ("nope",)),
    Mistake("view {files}/empty --out {out}.html", ("empty",)),
    Mistake("view {files}/a_file --out {out}.html", ("a_file",)),
    Mistake("prepare segment {files}/nope.jsonl --out {out}", ("nope.jsonl",)),
    Mistake("prepare segment {files}/no_columns.jsonl --out {out}", ("question",)),
    Mistake(
        "prepare segment {files}/traces.jsonl --column answer=expected_anser --out {out}",
        ("there is no column for answer=expected_anser",),
    ),
    Mistake(
        "prepare export {files}/prepared.jsonl --out {out} --to {files}/prepared.jsonl",
        ("prepared.jsonl is among what",),
    ),
    Mistake("view {files}/prepared.jsonl --out {files}/prepared.jsonl", ("prepared.jsonl is among the notes",)),
    Mistake("prepare check {files}/empty", ("empty",)),
    Mistake("prepare export {files}/empty --to {out}.jsonl", ("empty",)),
    Mistake("prepare segmnt x --out {out}", ("invalid choice", "segment"), code=2),
    Mistake("prepare stats {files}/nope", ("nope",)),
    Mistake("diagnose {files}/nope --data x.jsonl", ("nope",)),
    Mistake("diagnose tiny-hcot --data {files}/nope.jsonl", ("nope.jsonl",)),
]
MISTAKES = [*MODEL_ARGUMENTS, *PLACES, *GENERATION, *RUNS, *OWN_TASKS, *COMPARE, *COMMANDS]


DAMAGED = "no_tokenizer no_config no_weights pointer damaged bad_config bad_tokenizer larger_tokenizer unmarked".split()


def write_files(folder: Path) -> Path:
    """Writes what the lines above name."""
    model = BUNDLED_MODELS / "tiny-hcot"
    (folder / "a_file").write_text("no directory")
    (folder / "empty").mkdir()
    for name in DAMAGED:
        shutil.copytree(model, folder / name)
    for path in (folder / "no_tokenizer").glob("tokenizer*"):
        path.unlink()
    (folder / "no_config" / "config.json").unlink()
    (folder / "no_weights" / "model.safetensors").unlink()
    (folder / "pointer" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    weights = (model / "model.safetensors").read_bytes()
    (folder / "damaged" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (folder / "bad_config" / "config.json").write_text("{no json")
    (folder / "bad_tokenizer" / "tokenizer.json").write_text("{no json")
    _write_tokenizers(folder)
    (folder / "list.yaml").write_text("- a\n- b\n")
    (folder / "broken.yaml").write_text("a: [1\n")
    settings = {
        "model": "tiny",
        "output": str(folder / "run"),
        "data": {"train": [{"path": "synthetic:arith"}], "held_out_share": 0.1},
    }
    settings |= {"phases": [{"policy": "off", "steps": 1}], "trainer": {"learning_rat": 1}}
    (folder / "unknown.yaml").write_text(json.dumps(settings))
    (folder / "no_columns.jsonl").write_text('{"text": "nothing of use"}\n')
    trace = {"question": "1 + 1?", "response": "<think>It is 2.</think>2", "expected_answer": "2"}
    (folder / "traces.jsonl").write_text(json.dumps(trace) + "\n")
    prepared = {"question": "1 + 1?", "hierarchical_cot": "[THOUGHT]a[SOLUTION]2[RETURN]", "expected_answer": "2"}
    (folder / "prepared.jsonl").write_text(json.dumps(prepared) + "\n")
    _write_tasks(folder / "tasks")
    build_run(folder / "good", [1, 0])
    build_run(folder / "other_task", [1, 0], task="other")
    torn = build_run(folder / "torn", [1, 0])
    torn.write_text(torn.read_text()[:100])
    return folder


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: ""
generation_kwargs: {{until: [], max_gen_toks: 5}}
"""
BOXED, SAMPLED = (f"class: !function hcot_lmeval.scoring.task.{name}" for name in ("BoxedTask", "SampledTask"))
METRICS = "metric_list: [{metric: acc}]\nprocess_results: !function hcot_lmeval.scoring.process."
TASKS = {
    "no_answer": ("unanswered", BOXED),
    "no_answer_function": ("unanswered", f"{METRICS}boxed"),
    "not_filtered": ("answered", f"repeats: 2\n{METRICS}sampled"),
    "no_level": ("answered", f"{METRICS}polymath"),
    "one_response": ("answered", BOXED),
    "no_repeats": ("answered", f"repeats: 0\n{SAMPLED}"),
}
"""Name -> its data and the rest of its file."""


def _write_tasks(folder: Path) -> None:
    folder.mkdir()
    (folder / "answered.jsonl").write_text('{"question": "2+2?", "answer": "4"}\n')
    (folder / "unanswered.jsonl").write_text('{"question": "2+2?", "solution": "4"}\n')
    for name, (data, rest) in TASKS.items():
        made = TASK.format(name=name, data=folder / f"{data}.jsonl")
        (folder / f"{name}.yaml").write_text(made + rest + "\n")


def _write_tokenizers(folder: Path) -> None:
    """One with more tokens than the bundled model has rows, and one that lacks the markers."""
    from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

    shutil.rmtree(folder / "larger_tokenizer")
    save_tiny(folder / "larger_tokenizer", tiny_model("qwen2"))
    shutil.rmtree(folder / "unmarked")
    save_tiny(folder / "unmarked", tiny_model("qwen2"), tiny_tokenizer(markers=False))
