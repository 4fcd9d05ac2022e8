// mpvg::pe_layer_norm_{fwd,bwd}_cuda, mpvg::pe_norm_pool_{fwd,bwd}_cuda and mpvg::pe_chain_{fwd,bwd}_cuda: allocate the results and call the
// launchers of the .cu files. Arguments are checked in Python.
#include <algorithm>
#include <string>

#include "host.h"

namespace mpvg::cuda {
namespace {

Outputs norm_fwd(Tensor x, MaybeTensor branch, MaybeTensor branch_scale, Tensor weight, MaybeTensor bias, MaybeTensor pos,
                 MaybeTensor pos_weight, MaybeTensor pos_bias, double eps, double pos_eps, int64_t num_prefix_tokens, ScalarType out_dtype,
                 bool save) {
  const OnDevice on(x);
  const Shape shape = shape_of(x, num_prefix_tokens);
  const auto [B, N, D, prefix] = shape;
  const ScalarType x_dtype = x.scalar_type();
  Output y(on, true, {B, N, D}, out_dtype);
  Output h(on, bool(branch), {B, N, D}, branch ? promote(x_dtype, branch->scalar_type()) : x_dtype);
  Output pos_out(on, bool(pos_weight), {N - prefix, D}, pos ? pos->scalar_type() : x_dtype);
  Output stats(on, save, {2, B, N}, ScalarType::Float);
  pe_layer_norm_fwd({shape, eps, pos_eps, view(x), view(branch), view(branch_scale), view(weight), view(bias), view(pos), view(pos_weight),
                     view(pos_bias)},
                    {y.view, h.view, pos_out.view, stats.view}, on.stream);
  return {*y.tensor, h.tensor, pos_out.tensor, stats.tensor};
}

Grads norm_bwd(Tensor dy, MaybeTensor dh, MaybeTensor dpos_out, Tensor h, Tensor stats, Tensor weight, MaybeTensor branch_scale,
               MaybeTensor pos, MaybeTensor pos_weight, double pos_eps, int64_t num_prefix_tokens, ScalarType x_dtype,
               ScalarType branch_dtype, int64_t grad_mask) {
  const OnDevice on(h);
  const Shape shape = shape_of(h, num_prefix_tokens);
  const GradOutputs grads(on, shape, grad_mask, x_dtype, branch_dtype, weight, pos, pos_weight);
  ScratchTensor scratch{on, {}};
  pe_layer_norm_bwd({shape, pos_eps, view(h), view(stats), view(branch_scale), view(weight), view(pos), view(pos_weight)}, view(dy),
                    view(dh), view(dpos_out), grads.views(), scratch, on.stream);
  return grads.tensors();
}

Outputs pool_fwd(Tensor x, MaybeTensor branch, MaybeTensor branch_scale, Tensor weight, MaybeTensor bias, MaybeTensor pos,
                 MaybeTensor pos_weight, MaybeTensor pos_bias, double eps, double pos_eps, int64_t num_prefix_tokens, ScalarType out_dtype,
                 bool save) {
  const OnDevice on(x);
  const Shape shape = shape_of(x, num_prefix_tokens);
  const auto [B, N, D, prefix] = shape;
  const ScalarType x_dtype = x.scalar_type();
  Output out(on, true, {B, D}, out_dtype);
  Output h(on, branch && save, {B, N, D}, branch ? promote(x_dtype, branch->scalar_type()) : x_dtype);
  Output stats(on, save, {2, B, N}, ScalarType::Float);
  Output s(on, save, {B, D}, ScalarType::Float);
  ScratchTensor scratch{on, {}};
  pe_norm_pool_fwd({shape, eps, pos_eps, view(x), view(branch), view(branch_scale), view(weight), view(bias), view(pos), view(pos_weight),
                    view(pos_bias)},
                   {out.view, h.view, stats.view, s.view}, scratch, on.stream);
  return {*out.tensor, h.tensor, stats.tensor, s.tensor};
}

Grads pool_bwd(Tensor dout, Tensor h, Tensor stats, Tensor s, Tensor weight, MaybeTensor branch_scale, MaybeTensor pos,
               MaybeTensor pos_weight, double pos_eps, int64_t num_prefix_tokens, ScalarType x_dtype, ScalarType branch_dtype,
               int64_t grad_mask) {
  const OnDevice on(h);
  const Shape shape = shape_of(h, num_prefix_tokens);
  const GradOutputs grads(on, shape, grad_mask, x_dtype, branch_dtype, weight, pos, pos_weight);
  ScratchTensor scratch{on, {}};
  pe_norm_pool_bwd({shape, pos_eps, view(h), view(stats), view(branch_scale), view(weight), view(pos), view(pos_weight)}, view(dout),
                   view(s), grads.views(), scratch, on.stream);
  return grads.tensors();
}

PEChainInputs chain_inputs(const Tensor& pos, const Tensor& weight, const MaybeTensor& bias, double eps, bool hierarchical) {
  const int64_t L = weight.size(0), K = pos.size(0), D = pos.size(1);
  check_sizes("a result", L, K, D);
  return {L, K, D, eps, hierarchical, view(pos), view(weight), view(bias)};
}

Tensor chain_fwd(Tensor pos, Tensor weight, MaybeTensor bias, double eps, bool hierarchical, ScalarType out_dtype) {
  const OnDevice on(pos);
  const PEChainInputs in = chain_inputs(pos, weight, bias, eps, hierarchical);
  Output out(on, true, {in.L, in.K, in.D}, out_dtype);
  ScratchTensor scratch{on, {}};
  pe_chain_fwd(in, out.view, scratch, on.stream);
  return *out.tensor;
}

ChainGrads chain_bwd(Tensor dout, Tensor pos, Tensor weight, MaybeTensor bias, double eps, bool hierarchical, int64_t grad_mask) {
  const OnDevice on(pos);
  const PEChainInputs in = chain_inputs(pos, weight, bias, eps, hierarchical);
  Output dpos(on, grad_mask & kChainPos, {in.K, in.D}, pos.scalar_type());
  Output dweight(on, grad_mask & kChainWeight, {in.L, in.D}, weight.scalar_type());
  Output dbias(on, grad_mask & kChainBias, {in.L, in.D}, weight.scalar_type());
  ScratchTensor scratch{on, {}};
  pe_chain_bwd(in, view(dout), {dpos.view, dweight.view, dbias.view}, scratch, on.stream);
  return {dpos.tensor, dweight.tensor, dbias.tensor};
}

// What this extension was compiled for, as TORCH_CUDA_ARCH_LIST writes it, with spaces between.
std::string architectures() { return MPVG_CUDA_ARCHITECTURES; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mpvg, m) { m.def("cuda_architectures() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(mpvg, CompositeExplicitAutograd, m) { m.impl("cuda_architectures", TORCH_BOX(&architectures)); }

STABLE_TORCH_LIBRARY_IMPL(mpvg, MPVG_DISPATCH_KEY, m) {
  m.impl("pe_layer_norm_fwd_cuda", TORCH_BOX(&norm_fwd));
  m.impl("pe_layer_norm_bwd_cuda", TORCH_BOX(&norm_bwd));
  m.impl("pe_norm_pool_fwd_cuda", TORCH_BOX(&pool_fwd));
  m.impl("pe_norm_pool_bwd_cuda", TORCH_BOX(&pool_bwd));
  m.impl("pe_chain_fwd_cuda", TORCH_BOX(&chain_fwd));
  m.impl("pe_chain_bwd_cuda", TORCH_BOX(&chain_bwd));
}

}  // namespace mpvg::cuda
