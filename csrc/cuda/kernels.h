// The interface between the operators (which know torch) and their launchers (which do not). Arguments as in ../arguments.h; data lies
// on the current device, work goes to `stream`.
#pragma once

#include <cuda_runtime.h>

#include "../arguments.h"

namespace mpvg::cuda {

// Device memory for the length of a call: take(bytes, context).
struct Scratch {
  void* (*take)(int64_t bytes, void* context);
  void* context;
};

void pe_layer_norm_fwd(const Inputs&, const PELayerNormOutputs&, cudaStream_t);
void pe_layer_norm_bwd(const Saved&, View dy, View dh, View dpos_out, const Gradients&, Scratch, cudaStream_t);
void pe_norm_pool_fwd(const Inputs&, const PENormPoolOutputs&, Scratch, cudaStream_t);
void pe_norm_pool_bwd(const Saved&, View dout, View s, const Gradients&, Scratch, cudaStream_t);
void pe_chain_fwd(const PEChainInputs&, View out, Scratch, cudaStream_t);
void pe_chain_bwd(const PEChainInputs&, View dout, const PEChainGradients&, Scratch, cudaStream_t);

}  // namespace mpvg::cuda
