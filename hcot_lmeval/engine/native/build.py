"""Compiles the kernels for the processor at hand, once; the results are kept in the user's cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from filelock import FileLock

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("kernel")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC")
FLAGS_VARIABLE = "HCOT_LMEVAL_CXXFLAGS"
"""Further flags: ``-O1`` compiles faster, ``-DVECTOR_BYTES=32`` computes as on another processor (16, 32 or 64)."""
WEIGHTS = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat16"}
"""The types of weights that the kernel knows, by the names they have in it."""
LOGITS = (torch.float32, torch.float64)
"""The types of logits that tokens are chosen from."""
RESULTS = {
    **dict.fromkeys(("scratch_bytes", "blocks", "pack"), ctypes.c_size_t),
    "time_products": ctypes.c_double,
}
"""What functions of the compiled step return, other than an int."""
COMPILE_SECONDS = 300
"""A compiler that takes longer hangs; ordinarily it takes three seconds."""


class KernelUnavailableError(RuntimeError):
    """The kernel cannot be used here; the message says why."""


@functools.cache
def load_kernel(weight: torch.dtype, cache: torch.dtype) -> ctypes.CDLL:
    """Returns the compiled step for models with weights of the one type, and keys and values of the other.

    Raises:
        KernelUnavailableError: no kernel for this type, no compiler, or the compiler failed.
    """
    _check_types(weight, cache)
    kernel = _load("step", WEIGHT=WEIGHTS[weight], CACHE=WEIGHTS[cache])
    for name, result in RESULTS.items():
        getattr(kernel, name).restype = result
    return kernel


@functools.cache
def load_sampler(logits: torch.dtype) -> ctypes.CDLL:
    """Returns the compiled choice of tokens from logits of this type, as `load_kernel` does.

    Raises:
        KernelUnavailableError: logits are neither float32 nor float64, no compiler, or the compiler failed.
    """
    if logits not in LOGITS:
        raise KernelUnavailableError(f"logits are {logits}; the kernel knows float32 and float64".replace("torch.", ""))
    return _load("sample", WEIGHT=WEIGHTS[logits])


def _load(source: str, **types: str) -> ctypes.CDLL:
    """Returns the library of a source file, compiled with these types.

    The compiler is ``$CXX``, else c++, g++ or clang++. The library is kept in ``$HCOT_LMEVAL_CACHE/kernels``, else
    ``~/.cache/hcot_lmeval/kernels``, under a name that changes with source, compiler and processor, and says what is in
    it: a damaged one would end the process, so it is compiled again.

    Raises:
        KernelUnavailableError: no compiler, or the compiler failed.
        ValueError: the compiler failed with the flags of ``$HCOT_LMEVAL_CXXFLAGS``.
    """
    compiler = find_compiler()
    name = f"{'-'.join((source, *types.values()))}-{_fingerprint(compiler)}"
    path = _kept(name) or compile_kernel(compiler, source, types, name)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelUnavailableError(f"{path} cannot be loaded: {error}") from error


def _check_types(weight: torch.dtype, cache: torch.dtype) -> None:
    names = [str(dtype).removeprefix("torch.") for dtype in (weight, cache)]
    if weight not in WEIGHTS:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in WEIGHTS)
        raise KernelUnavailableError(f"weights are {names[0]}; the kernel knows {known}")
    if cache != weight and (weight, cache) != (torch.float32, torch.bfloat16):
        raise KernelUnavailableError(f"the kernel does not combine weights in {names[0]} with a cache in {names[1]}")


def find_compiler() -> str:
    """Returns the C++ compiler.

    Raises:
        KernelUnavailableError: there is none.
    """
    named = os.environ.get("CXX")
    for name in [named] if named else ["c++", "g++", "clang++"]:
        found = shutil.which(name)
        if found:
            return found
    raise KernelUnavailableError(
        f"CXX={named} is not on the PATH"
        if named
        else "no C++ compiler (c++, g++, clang++) is on the PATH; install one"
    )


def kernel_folder() -> Path:
    """Returns where compiled kernels are kept."""
    cache = os.environ.get("HCOT_LMEVAL_CACHE")
    return (Path(cache) if cache else Path.home() / ".cache" / "hcot_lmeval") / "kernels"


def _flags() -> list[str]:
    """What the compiler is called with: `FLAGS`, then those of the user, which win."""
    return [*FLAGS, *shlex.split(os.environ.get(FLAGS_VARIABLE, ""))]


def _fingerprint(compiler: str) -> str:
    about = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    sources = [path.read_text(encoding="utf-8") for path in sorted(SOURCES.glob("*.?pp"))]
    parts = (*sources, " ".join(_flags()), about, _processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What -march=native looks at, so that homes shared between machines do not mix their kernels."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    found = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join(sorted(found)) or f"{platform.machine()} {platform.processor()}"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _kept(name: str) -> Path | None:
    """The library of that name, if it is there and whole; damaged ones are removed."""
    for path in sorted(kernel_folder().glob(f"{name}-*.so")):
        try:
            if path.stem == f"{name}-{_digest(path)}":
                return path
            path.unlink()
        except OSError as error:
            raise KernelUnavailableError(f"{path} is damaged or cannot be read: {error}; remove it") from error
    return None


def compile_kernel(compiler: str, source: str, types: Mapping[str, str], name: str) -> Path:
    """Compiles beside the target and renames, so that of several processes each finds a whole file or none."""
    try:
        home = kernel_folder()
        home.mkdir(parents=True, exist_ok=True)
        locks = home / ".locks"
        locks.mkdir(exist_ok=True)
        # ranks and workers want the same library at the same time: one compiles, the others wait
        with FileLock(locks / name), tempfile.TemporaryDirectory(dir=home) as folder:
            if kept := _kept(name):
                return kept
            logger.warning("compiling %s for this processor, which is done once and takes up to a minute", name)
            target = Path(folder) / f"{name}.so"
            defined = [f"-D{name}={value}" for name, value in types.items()]
            command = [compiler, *_flags(), *defined, str(SOURCES / f"{source}.cpp"), "-o", str(target)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMPILE_SECONDS)
            if done.returncode:
                raise _failure(command, done.stderr)
            path = home / f"{name}-{_digest(target)}.so"
            target.replace(path)
            return path
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelUnavailableError(f"the kernel could not be compiled: {error}") from error


def _failure(command: Sequence[str], stderr: str) -> ValueError | KernelUnavailableError:
    """What a failed compiler says, in its first error; flags of the user are theirs to correct."""
    first = next((line for line in stderr.splitlines() if "error" in line), stderr.strip()[-500:])
    if flags := os.environ.get(FLAGS_VARIABLE):
        return ValueError(f"{FLAGS_VARIABLE}={flags!r}: {command[0]} failed: {first}; correct or unset it")
    return KernelUnavailableError(f"{' '.join(command)} failed: {first}")
