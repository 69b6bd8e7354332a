"""Run, measure and train language models that prune their own chain of thought."""
