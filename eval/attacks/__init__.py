"""
Does it stay forgotten? Attacks on an unlearned model, and how much of what it had forgotten each brings back.

| file | what |
|---|---|
| `relearning.py` | a little training on some of the forgotten rows, or on something else |
| `quantization.py` | weights of 8 or 4 bits |
| `prompting.py` | other words, examples, roles, the beginning of the answer |
| `recovered.py` | the share recovered, with its interval |
| `running.py` | asks the models under the attacks, and nothing twice |
| `command.py` | `python -m soul_eval attack`, on TOFU |

The functions of the first four serve any suite. See docs/attacks.md for what the figures mean.
"""
