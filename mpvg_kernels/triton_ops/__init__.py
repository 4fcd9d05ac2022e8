"""The `triton` backend. Importing it registers its kernels as the `_triton` operators of the `mpvg` library.

For CUDA tensors; for CPU tensors too, where TRITON_INTERPRET=1 (set before the import) makes Triton run kernels in its
interpreter: slow, and bf16 results are truncated there instead of rounded, but it is the same code.
"""

import torch
import triton

from . import pe_chain, pe_layer_norm, pe_norm_pool

_LIBRARY = torch.library.Library("mpvg", "IMPL")
for _dispatch_key in ("CUDA", "CPU") if triton.knobs.runtime.interpret else ("CUDA",):
    for _operator in (pe_layer_norm, pe_norm_pool, pe_chain):
        _name = _operator.__name__.rpartition(".")[2]
        _LIBRARY.impl(f"{_name}_fwd_triton", _operator.forward, _dispatch_key)
        _LIBRARY.impl(f"{_name}_bwd_triton", _operator.backward, _dispatch_key)
