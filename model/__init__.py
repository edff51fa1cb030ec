"""The Llama 3 model: configuration, blocks, loss, initial weights, closed forms of its size.

Knows torch alone. Meshes, precision policies and compilation are applied from outside, by the names
of modules and parameters, which are Meta's.
"""
