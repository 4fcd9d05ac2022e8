"""The operators: for each, its schema, fakes, plain formula, and the autograd Function around the raw operators."""

from . import pe_chain, pe_layer_norm, pe_norm_pool

__all__ = ["pe_chain", "pe_layer_norm", "pe_norm_pool"]
