// Compiles every kernel for one instruction set. Included once by each isa_*.cpp, which has set MPVG_ISA (a namespace) and
// MPVG_VECTOR_BYTES, and has switched the target on after its own includes: what follows may include no other header.
#pragma once

#include "vec.h"
#include "../row_math.h"
#include "rows.h"
#include "pos_rows.h"
#include "pe_chain.h"
#include "pe_layer_norm.h"
#include "pe_norm_pool.h"

namespace mpvg::MPVG_ISA {

// Everything is double, or nothing is.
inline void pe_chain_fwd_any(const PEChainInputs& in, View out, ParallelFor f) {
  in.pos.dtype == Dtype::f64 ? pe_chain_fwd<double>(in, out, f) : pe_chain_fwd<float>(in, out, f);
}
inline void pe_chain_bwd_any(const PEChainInputs& in, View dout, const PEChainGradients& grad, ParallelFor f) {
  in.pos.dtype == Dtype::f64 ? pe_chain_bwd<double>(in, dout, grad, f) : pe_chain_bwd<float>(in, dout, grad, f);
}
inline void pe_layer_norm_fwd_any(const Inputs& in, const PELayerNormOutputs& out, ParallelFor f) {
  in.x.dtype == Dtype::f64 ? pe_layer_norm_fwd<double>(in, out, f) : pe_layer_norm_fwd<float>(in, out, f);
}
inline void pe_layer_norm_bwd_any(const Saved& in, View dy, View dh, View dpos_out, const Gradients& grad, ParallelFor f) {
  in.h.dtype == Dtype::f64 ? pe_layer_norm_bwd<double>(in, dy, dh, dpos_out, grad, f)
                           : pe_layer_norm_bwd<float>(in, dy, dh, dpos_out, grad, f);
}
inline void pe_norm_pool_fwd_any(const Inputs& in, const PENormPoolOutputs& out, ParallelFor f) {
  in.x.dtype == Dtype::f64 ? pe_norm_pool_fwd<double>(in, out, f) : pe_norm_pool_fwd<float>(in, out, f);
}
inline void pe_norm_pool_bwd_any(const Saved& in, View dout, View s, const Gradients& grad, ParallelFor f) {
  in.h.dtype == Dtype::f64 ? pe_norm_pool_bwd<double>(in, dout, s, grad, f) : pe_norm_pool_bwd<float>(in, dout, s, grad, f);
}

constexpr Kernels table(const char* isa, bool (*runs_here)()) {
  return {isa,
          runs_here,
          pe_chain_fwd_any,
          pe_chain_bwd_any,
          pe_layer_norm_fwd_any,
          pe_layer_norm_bwd_any,
          pe_norm_pool_fwd_any,
          pe_norm_pool_bwd_any};
}

}  // namespace mpvg::MPVG_ISA
