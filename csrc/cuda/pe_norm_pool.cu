// Launchers of pe_norm_pool's kernels.
#include "pe_norm_pool.cuh"

#include "dispatch.cuh"

namespace mpvg::cuda {

void pe_norm_pool_fwd(const Inputs& in, const PENormPoolOutputs& out, Scratch scratch, cudaStream_t stream) {
  const int64_t B = in.shape.B, N = in.shape.N, D = in.shape.D, prefix = in.shape.prefix;
  PoolForward a{int(B), int(N), int(D), int(prefix), {}, float(in.eps), float(in.pos_eps), in.x, in.branch, in.scale, in.pos, out.h,
                bool(in.pos_weight), static_cast<float*>(out.stats.data), nullptr, nullptr};
  // h that is not kept is rounded to its dtype all the same.
  if (in.branch && !out.h) a.h.dtype = in.x.dtype == in.branch.dtype ? in.x.dtype : Dtype::f32;
  int64_t chunks = 1;
  const auto take_memory = [&] {
    Pieces pieces;
    float* const s = static_cast<float*>(out.s.data);
    const bool direct = s && chunks == 1;  // a single chunk's partial sum is s
    const int64_t partial_at = pieces.add(direct ? 0 : B * chunks * D, sizeof(float));
    const int64_t pos_at = pieces.add(in.pos ? chunks * D : 0, sizeof(float));
    pieces.take(scratch);
    a.partial = direct ? s : pieces.at<float>(partial_at);
    if (in.pos) a.pos_partial = pieces.at<float>(pos_at);
  };
  const int64_t samples = B + (in.pos ? 1 : 0);

  bool launched = false;
  if (D <= Rules::widest) {
    // There is no y to speak of: the narrowest mix that has x's and the branch's types.
    const Dtype y = in.branch ? in.branch.dtype : in.x.dtype;
    with_types(in.x.dtype, in.branch.dtype, y, D, {in.x, in.branch, out.h}, [&](auto types) {
      using T = decltype(types);
      with_tile<T>(D, [&](auto per_lane, const RowTile& tile) {
        using L = Layout<per_lane, T::E, T::whole>;
        const int stage_bytes =
            RowStream<typename T::X, L>::bytes(tile.threads) + (in.branch ? RowStream<typename T::F, L>::bytes(tile.threads) : 0);
        const size_t fixed_bytes = kExchange * sizeof(float);
        const Occupancy fit(tile, stage_bytes, fixed_bytes);
        if (!fit.fits) return;
        const Slices cut(ceil_div(N, tile.rows), samples, fit.wave, Rules::most_chunks);
        chunks = cut.slices;
        a.share = {tile.lanes, int(chunks), int(cut.length), fit.stages, stage_bytes};
        take_memory();
        const size_t shared = std::max(fit.shared_bytes, fixed_bytes + tile.rows * padded(int(D)) * sizeof(float));
        launch("pe_norm_pool_fwd", pe_norm_pool_fwd_kernel<T, per_lane>, samples * chunks, tile.threads, shared, stream, a);
        launched = true;
      });
    });
  }
  if (!launched) {
    take_memory();
    launch("pe_norm_pool_fwd_loop", pe_norm_pool_fwd_loop_kernel, samples, Rules::finish_threads, kExchange * sizeof(float), stream, a);
  }
  const int threads = 128;
  const PoolOutput last{int(B), int(D), int(chunks), a.partial, a.pos_partial, in.weight, in.bias, in.pos_weight, in.pos_bias, out.out,
                        static_cast<float*>(out.s.data)};
  launch("pe_norm_pool_output", pe_norm_pool_output_kernel, ceil_div(D, threads) * ceil_div(B, kOutputSamples), threads, 0, stream, last);
}

void pe_norm_pool_bwd(const Saved& in, View dout, View s, const Gradients& grad, Scratch scratch, cudaStream_t stream) {
  const int64_t B = in.shape.B, N = in.shape.N, D = in.shape.D, prefix = in.shape.prefix;
  if (grad.x || grad.branch) {
    PoolBackward a{int(B), int(N), int(D), int(prefix), {}, float(in.pos_eps), dout, in.h, in.scale, in.weight, grad.x, grad.branch,
                   static_cast<const float*>(in.stats.data)};
    bool launched = false;
    if (D <= Rules::widest) {
      const bool mixed = grad.x && grad.x.dtype != in.h.dtype;
      const Dtype y = grad.branch ? grad.branch.dtype : in.h.dtype;
      with_types(mixed ? Dtype::absent : in.h.dtype, grad.branch.dtype, y, D, {in.h, grad.x, grad.branch}, [&](auto types) {
        using T = decltype(types);
        with_tile<T>(D, [&](auto per_lane, const RowTile& tile) {
          using L = Layout<per_lane, T::E, T::whole>;
          const int stage_bytes = RowStream<typename T::H, L>::bytes(tile.threads);
          const Occupancy fit(tile, stage_bytes, kExchange * sizeof(float));
          if (!fit.fits) return;
          const Slices cut(ceil_div(N, tile.rows), B, fit.wave, N);
          a.share = {tile.lanes, int(cut.slices), int(cut.length), fit.stages, stage_bytes};
          launch("pe_norm_pool_bwd", pe_norm_pool_bwd_kernel<T, per_lane>, B * cut.slices, tile.threads, fit.shared_bytes, stream, a);
          launched = true;
        });
      });
    }
    if (!launched)
      launch("pe_norm_pool_bwd_loop", pe_norm_pool_bwd_loop_kernel, B, Rules::finish_threads, kExchange * sizeof(float), stream, a);
  }

  const bool rows = grad.pos || grad.pos_weight;
  if (!rows && !grad.weight && !grad.bias && !grad.pos_bias) return;
  const int64_t K = N - prefix, pos_moments = rows && in.pos_weight ? K : 0;
  Pieces pieces;
  const int64_t dp_at = pieces.add(rows ? D : 0, sizeof(float)), moments_at = pieces.add(pos_moments, sizeof(Moments<float>));
  pieces.take(scratch);
  float* const dp = rows ? pieces.at<float>(dp_at) : nullptr;
  Moments<float>* const moments = pos_moments ? pieces.at<Moments<float>>(moments_at) : nullptr;
  const PoolSums sums{int(B), int(D), int(K), float(in.pos_eps), dout, s, in.pos, grad.weight, grad.bias, grad.pos_bias, dp, moments};
  launch("pe_norm_pool_sums", pe_norm_pool_sums_kernel, ceil_div(D, Rules::strip) + pos_moments, Rules::finish_threads,
         Rules::finish_threads * sizeof(float), stream, sums);
  // dp' is the same row for every token: one slice, and a step of 0 from row to row.
  const Finish last{int(D), int(K), 0, 1, dp, 0, 0, moments, {}, in.pos, in.pos_weight, {}, grad.pos, grad.pos_weight, {}, {}, false};
  if (rows) finish(last, stream);
}

}  // namespace mpvg::cuda
