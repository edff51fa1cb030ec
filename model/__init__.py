"""Llama 3: configuration, blocks, loss, weight initialization, parameter and FLOP counts.

Depends only on torch and annotated_types. Parallelism, mixed precision and compilation are applied
from outside, by module and parameter name; the names are Meta's.
"""
