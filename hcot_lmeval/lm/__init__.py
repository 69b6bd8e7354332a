"""``--model hcot`` of lm-evaluation-harness; read `model` first."""

from hcot_lmeval.lm.model import HcotLM

__all__ = ["HcotLM"]
