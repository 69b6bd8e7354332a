"""What the tasks measure and how.

process.py          what lm-eval calls for each document: responses and the gold answer → numbers
aggregate.py        numbers of many responses → estimates (pass@k, maj@k, difficulty-weighted accuracy)
language.py         is a text written in the language that was asked for
data.py             the data sets, from the hub or from a local directory
instructions.py     the sentence that asks for a boxed answer, in 18 languages
task.py             the task classes that the YAML files name                      [lm_eval]
"""
