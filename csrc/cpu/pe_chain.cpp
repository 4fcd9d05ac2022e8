// mpvg::pe_chain_{fwd,bwd}_cpp: allocates the results and calls the kernels of pe_chain.h. Arguments are checked in Python.
#include "host.h"

namespace mpvg {

Tensor pe_chain_fwd(Tensor pos, Tensor weight, MaybeTensor bias, double eps, bool hierarchical, ScalarType out_dtype) {
  const int64_t L = weight.size(0), K = pos.size(0), D = pos.size(1);
  Output out(OnCpu{}, true, {L, K, D}, out_dtype);
  kernels().pe_chain_fwd({L, K, D, eps, hierarchical, view(pos), view(weight), view(bias)}, out.view, parallel_for);
  return *out.tensor;
}

ChainGrads pe_chain_bwd(Tensor dout, Tensor pos, Tensor weight, MaybeTensor bias, double eps, bool hierarchical, int64_t grad_mask) {
  const OnCpu on;
  const int64_t L = weight.size(0), K = pos.size(0), D = pos.size(1);
  Output dpos(on, grad_mask & kChainPos, {K, D}, pos.scalar_type());
  Output dweight(on, grad_mask & kChainWeight, {L, D}, weight.scalar_type());
  Output dbias(on, grad_mask & kChainBias, {L, D}, weight.scalar_type());
  kernels().pe_chain_bwd({L, K, D, eps, hierarchical, view(pos), view(weight), view(bias)}, view(dout),
                         {dpos.view, dweight.view, dbias.view}, parallel_for);
  return {dpos.tensor, dweight.tensor, dbias.tensor};
}

STABLE_TORCH_LIBRARY_IMPL(mpvg, CPU, m) {
  m.impl("pe_chain_fwd_cpp", TORCH_BOX(&pe_chain_fwd));
  m.impl("pe_chain_bwd_cpp", TORCH_BOX(&pe_chain_bwd));
}

}  // namespace mpvg
