"""Apply: a `BatchDecision` becomes what the next step trains on, without losing a sample.

`plan` and `clock` need the standard library only; `sampler` and `loader` need torch. Import them by
module.
"""
