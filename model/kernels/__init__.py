"""CPU kernels: oneDNN linear layers, attention backward."""
