// Launchers of pe_chain's kernels.
#include "pe_chain.cuh"

#include "dispatch.cuh"

namespace mpvg::cuda {
namespace {

// Starts a kernel on K rows: those with a row in registers, or the loop above Rules::widest columns.
void launch_rows(const char* name, void (*kernel)(Chain), void (*loop)(Chain), Chain a, cudaStream_t stream) {
  const size_t shared = kExchange * sizeof(float);
  if (a.D > Rules::widest) return launch(name, loop, a.K, Rules::finish_threads, shared, stream, a);
  a.lanes = 1;
  while (a.lanes * kChainElements < a.D) a.lanes *= 2;
  const int threads = std::max(32, a.lanes);
  launch(name, kernel, ceil_div(a.K, threads / a.lanes), threads, shared, stream, a);
}

Chain chain(const PEChainInputs& in) {
  Chain a{int(in.L), int(in.K), int(in.D), 0, float(in.eps), in.hierarchical};
  a.pos = in.pos, a.weight = in.weight, a.bias = in.bias;
  return a;
}

}  // namespace

void pe_chain_fwd(const PEChainInputs& in, View out, Scratch scratch, cudaStream_t stream) {
  Chain a = chain(in);
  a.out = out;
  Pieces pieces;
  const int64_t rows_at = pieces.add(in.D > Rules::widest ? in.K * in.D : 0, sizeof(float));
  pieces.take(scratch);
  a.rows = pieces.at<float>(rows_at);
  launch_rows("pe_chain_fwd", in.hierarchical ? pe_chain_fwd_kernel<true> : pe_chain_fwd_kernel<false>, pe_chain_fwd_loop_kernel, a, stream);
}

void pe_chain_bwd(const PEChainInputs& in, View dout, const PEChainGradients& grad, Scratch scratch, cudaStream_t stream) {
  const int64_t L = in.L, K = in.K, D = in.D, layers = in.hierarchical ? L : 1;
  const bool wide = D > Rules::widest, sums = grad.weight || grad.bias;
  Chain a = chain(in);
  a.dout = dout, a.dpos = grad.pos, a.dweight = grad.weight, a.dbias = grad.bias;
  Pieces pieces;
  const bool vhat = wide || in.hierarchical || grad.weight;
  const int64_t vhat_at = pieces.add(vhat ? layers * K * D : 0, sizeof(float)), rstd_at = pieces.add(layers * K, sizeof(float));
  const int64_t r_at = pieces.add(in.hierarchical && sums ? L * K * D : 0, sizeof(float));
  const int64_t rows_at = pieces.add(wide ? K * D : 0, sizeof(float));
  pieces.take(scratch);
  const auto rows = [&](int64_t at, bool per_layer) { return View{pieces.at<float>(at), Dtype::f32, per_layer ? K * D : 0, D}; };
  if (vhat) a.vhat = rows(vhat_at, in.hierarchical);
  if (sums) a.r = in.hierarchical ? rows(r_at, true) : dout;
  a.rstd = pieces.at<float>(rstd_at);
  a.rows = pieces.at<float>(rows_at);
  launch_rows("pe_chain_bwd", in.hierarchical ? pe_chain_bwd_kernel<true> : pe_chain_bwd_kernel<false>, pe_chain_bwd_loop_kernel, a, stream);
  if (!sums) return;
  launch("pe_chain_sums", pe_chain_sums_kernel, L * ceil_div(D, Rules::strip), Rules::finish_threads, Rules::finish_threads * sizeof(float),
         stream, a);
}

}  // namespace mpvg::cuda
