// mpvg::pe_layer_norm_{fwd,bwd}_cpp: allocates the results and calls the kernels of pe_layer_norm.h. Arguments are checked in Python.
#include "host.h"

namespace mpvg {

Outputs pe_layer_norm_fwd(Tensor x, MaybeTensor branch, MaybeTensor branch_scale, Tensor weight, MaybeTensor bias, MaybeTensor pos,
                          MaybeTensor pos_weight, MaybeTensor pos_bias, double eps, double pos_eps, int64_t num_prefix_tokens,
                          ScalarType out_dtype, bool save) {
  const OnCpu on;
  const int64_t B = x.size(0), N = x.size(1), D = x.size(2);
  const ScalarType x_dtype = x.scalar_type();
  Output y(on, true, {B, N, D}, out_dtype);
  Output h(on, bool(branch), {B, N, D}, branch ? promote(x_dtype, branch->scalar_type()) : x_dtype);
  Output pos_out(on, bool(pos_weight), {N - num_prefix_tokens, D}, pos ? pos->scalar_type() : x_dtype);
  Output stats(on, save, {2, B, N}, arithmetic(x_dtype));
  kernels().pe_layer_norm_fwd({{B, N, D, num_prefix_tokens}, eps, pos_eps, view(x), view(branch), view(branch_scale), view(weight),
                               view(bias), view(pos), view(pos_weight), view(pos_bias)},
                              {y.view, h.view, pos_out.view, stats.view}, parallel_for);
  return {*y.tensor, h.tensor, pos_out.tensor, stats.tensor};
}

Grads pe_layer_norm_bwd(Tensor dy, MaybeTensor dh, MaybeTensor dpos_out, Tensor h, Tensor stats, Tensor weight, MaybeTensor branch_scale,
                        MaybeTensor pos, MaybeTensor pos_weight, double pos_eps, int64_t num_prefix_tokens, ScalarType x_dtype,
                        ScalarType branch_dtype, int64_t grad_mask) {
  check_stream_dtypes(h, dh, x_dtype, branch_dtype);
  const Shape shape{h.size(0), h.size(1), h.size(2), num_prefix_tokens};
  const GradOutputs grads(OnCpu{}, shape, grad_mask, x_dtype, branch_dtype, weight, pos, pos_weight);
  kernels().pe_layer_norm_bwd(
      {shape, pos_eps, view(h), view(stats), view(branch_scale), view(weight), view(pos), view(pos_weight)}, view(dy), view(dh),
      view(dpos_out), grads.views(), parallel_for);
  return grads.tensors();
}

STABLE_TORCH_LIBRARY_IMPL(mpvg, CPU, m) {
  m.impl("pe_layer_norm_fwd_cpp", TORCH_BOX(&pe_layer_norm_fwd));
  m.impl("pe_layer_norm_bwd_cpp", TORCH_BOX(&pe_layer_norm_bwd));
}

}  // namespace mpvg
