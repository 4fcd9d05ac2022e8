// Launchers of pe_layer_norm's kernels.
#include "pe_layer_norm.cuh"

#include "dispatch.cuh"

namespace mpvg::cuda {

void pe_layer_norm_fwd(const Inputs& in, const PELayerNormOutputs& out, cudaStream_t stream) {
  const int64_t B = in.shape.B, N = in.shape.N, D = in.shape.D, prefix = in.shape.prefix;
  NormForward a{int(B), int(N), int(D), int(prefix), {}, float(in.eps), float(in.pos_eps), in.x, in.branch, in.scale, in.weight, in.bias,
                in.pos, in.pos_weight, in.pos_bias, out.y, out.h, out.pos_out, static_cast<float*>(out.stats.data)};
  bool launched = false;
  if (D <= Rules::widest) with_types(in.x.dtype, in.branch.dtype, out.y.dtype, D, {in.x, in.branch, out.y, out.h}, [&](auto types) {
    using T = decltype(types);
    with_tile<T>(D, [&](auto per_lane, const RowTile& tile) {
      using L = Layout<per_lane, T::E, T::whole>;
      const int stage_bytes =
          RowStream<typename T::X, L>::bytes(tile.threads) + (in.branch ? RowStream<typename T::F, L>::bytes(tile.threads) : 0);
      const Occupancy fit(tile, stage_bytes, (padded(int(D)) + kExchange) * sizeof(float));
      if (!fit.fits) return;
      const int64_t tiles = ceil_div(N, tile.rows);
      const Slices slices(B, tiles, fit.wave, B);
      a.share = {tile.lanes, int(tiles), int(slices.length), fit.stages, stage_bytes};
      launch("pe_layer_norm_fwd", pe_layer_norm_fwd_kernel<T, per_lane>, tiles * slices.slices, tile.threads, fit.shared_bytes, stream, a);
      launched = true;
    });
  });
  if (!launched)
    launch("pe_layer_norm_fwd_loop", pe_layer_norm_fwd_loop_kernel, N, Rules::finish_threads, kExchange * sizeof(float), stream, a);
}

void pe_layer_norm_bwd(const Saved& in, View dy, View dh, View dpos_out, const Gradients& grad, Scratch scratch, cudaStream_t stream) {
  const int64_t B = in.shape.B, N = in.shape.N, D = in.shape.D, prefix = in.shape.prefix;
  const bool by_token = grad.pos || grad.pos_weight || grad.pos_bias;
  NormBackward a{int(B), int(N), int(D), int(prefix), {}, float(in.pos_eps), dy, dh, in.h, in.scale, in.weight, in.pos, grad.x,
                 grad.branch, static_cast<const float*>(in.stats.data), nullptr, nullptr, nullptr, by_token};
  int64_t blocks = 0, slices = 1;  // of the kernel, and the rows of its partial sums
  const auto take_memory = [&] {
    Pieces pieces;
    const int64_t dy_rows = by_token ? slices * N : grad.bias ? blocks : 0, dw_rows = grad.weight ? blocks : 0;
    const int64_t dy_at = pieces.add(dy_rows * D, sizeof(float)), dw_at = pieces.add(dw_rows * D, sizeof(float));
    const int64_t moments_at = pieces.add(by_token && in.pos_weight ? N - prefix : 0, sizeof(Moments<float>));
    pieces.take(scratch);
    if (dy_rows) a.dy_partial = pieces.at<float>(dy_at);
    if (dw_rows) a.dw_partial = pieces.at<float>(dw_at);
    if (by_token && in.pos_weight) a.moments = pieces.at<Moments<float>>(moments_at);
  };

  bool launched = false;
  if (D <= Rules::widest) {
    // Gradients in another dtype than h have no kernel of their own.
    const bool mixed = (grad.x && grad.x.dtype != in.h.dtype) || (dh && dh.dtype != in.h.dtype);
    with_types(mixed ? Dtype::absent : in.h.dtype, grad.branch.dtype, dy.dtype, D, {dy, dh, in.h, grad.x, grad.branch}, [&](auto types) {
      using T = decltype(types);
      with_tile<T>(D, [&](auto per_lane, const RowTile& tile) {
        using L = Layout<per_lane, T::E, T::whole>;
        const int stage_bytes =
            RowStream<typename T::Y, L>::bytes(tile.threads) + (dh ? 2 : 1) * RowStream<typename T::H, L>::bytes(tile.threads);
        const size_t fixed_bytes = (padded(int(D)) + kExchange) * sizeof(float);
        const Occupancy fit(tile, stage_bytes, fixed_bytes);
        if (!fit.fits) return;
        const int64_t tiles = ceil_div(N, tile.rows);
        int64_t most = B;
        if (by_token) most = std::max(B / Rules::samples_per_slice, Rules::cached_partial_bytes / (4 * std::max<int64_t>(N, 1) * D));
        const Slices cut(B, tiles, fit.wave, most);
        slices = cut.slices, blocks = tiles * slices;
        a.share = {tile.lanes, int(tiles), int(cut.length), fit.stages, stage_bytes};
        take_memory();
        // Column sums go through the same shared memory, when the rows have left it.
        const size_t shared = std::max(fit.shared_bytes, fixed_bytes + tile.rows * padded(int(D)) * sizeof(float));
        launch("pe_layer_norm_bwd", pe_layer_norm_bwd_kernel<T, per_lane>, blocks, tile.threads, shared, stream, a);
        launched = true;
      });
    });
  }
  if (!launched) {
    blocks = N;
    take_memory();
    launch("pe_layer_norm_bwd_loop", pe_layer_norm_bwd_loop_kernel, N, Rules::finish_threads, kExchange * sizeof(float), stream, a);
  }

  Finish last{int(D), int(N), int(prefix), int(slices), a.dy_partial, N * D, D, a.moments, dpos_out, in.pos, in.pos_weight,
              {}, grad.pos, grad.pos_weight, grad.pos_bias, {}, false};
  last.sums[0] = {a.dw_partial, blocks, grad.weight};
  if (by_token) last.dbias = grad.bias;
  else last.sums[1] = {a.dy_partial, blocks, grad.bias};
  finish(last, stream);
}

}  // namespace mpvg::cuda
