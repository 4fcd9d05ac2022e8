// For tests: runs every CUDA kernel on the host, without torch, on odd shapes, strides and dtypes; test_sanitizers.py compiles it with
// address and undefined-behaviour sanitizers. Tensors are allocated to the byte, so that a step outside of one is seen.
//
// Each call is made twice, with the threads in another order: results must be the same bits, and no result may be left unwritten (results
// start as NaN patterns; inputs are such that no NaN comes out). Prints "ok" at the end.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/cuda/dtypes.cuh"
#include "../../csrc/cuda/kernels.h"

using namespace mpvg;
using cuda::Scratch;

namespace {

std::mt19937 random_bits(0);

// Tensors' memory. Inputs hold numbers of magnitude 0.5 to 4, as bf16 has them, so that every dtype does; results hold NaN patterns.
struct Memory {
  struct Block {
    std::unique_ptr<char[]> data;
    size_t size;
    Dtype dtype;
    bool result;
  };
  std::vector<Block> blocks;

  View make(Dtype dtype, int64_t elements, int64_t stride_b, int64_t stride_n, bool result) {
    const size_t size = elements * bytes(dtype);
    char* p = new char[size];
    std::memset(p, 0xff, size);
    for (int64_t i = 0; i < elements && !result; ++i) {
      const float value = std::ldexp(1 + random_bits() % 128 / 128.0f, int(random_bits() % 3) - 1) * (random_bits() % 2 ? 1 : -1);
      if (dtype == Dtype::f32) std::memcpy(p + 4 * i, &value, 4);
      const auto b = __float2bfloat16_rn(value);
      if (dtype == Dtype::bf16) std::memcpy(p + 2 * i, &b, 2);
      const auto h = __float2half_rn(value);
      if (dtype == Dtype::f16) std::memcpy(p + 2 * i, &h, 2);
    }
    blocks.push_back({std::unique_ptr<char[]>(p), size, dtype, result});
    return {p, dtype, stride_b, stride_n};
  }
  View vector(Dtype t, int64_t D, bool result = false) { return make(t, D, 0, 0, result); }
  View rows(Dtype t, int64_t N, int64_t D, bool result = false) { return make(t, N * D, 0, D, result); }
  View tensor(Dtype t, const Shape& s, bool result = false) { return make(t, s.B * s.N * s.D, s.N * s.D, s.D, result); }
  View expanded(Dtype t, const Shape& s) { return make(t, s.D, 0, 0, false); }  // one row for all
  View unaligned(Dtype t, const Shape& s) {                                     // rows one element apart, after one element
    View v = make(t, 1 + s.B * s.N * (s.D + 1), s.N * (s.D + 1), s.D + 1, false);
    v.data = static_cast<char*>(v.data) + bytes(t);
    return v;
  }

  // The results' bytes, and NaN patterns in their place.
  std::vector<char> take_results() {
    std::vector<char> all;
    for (const Block& b : blocks)
      if (b.result) {
        all.insert(all.end(), b.data.get(), b.data.get() + b.size);
        std::memset(b.data.get(), 0xff, b.size);
      }
    return all;
  }
  // Whether a result holds the pattern that all of them started with.
  bool unwritten(const std::vector<View>& results) const {
    for (const Block& b : blocks)
      for (const View& v : results)
        if (v && v.data == b.data.get())
          for (size_t i = 0; i < b.size; i += bytes(b.dtype))
            if (!std::memcmp(b.data.get() + i, "\xff\xff\xff\xff", bytes(b.dtype))) return true;
    return false;
  }
};

struct Temporary {
  std::vector<std::unique_ptr<char[]>> blocks;
  operator Scratch() {
    return {[](int64_t bytes, void* self) -> void* {
              auto& blocks = static_cast<Temporary*>(self)->blocks;
              blocks.emplace_back(new char[bytes]);
              std::memset(blocks.back().get(), 0xff, bytes);
              return blocks.back().get();
            },
            this};
  }
};

template <class Run>
void check(const char* what, const Shape& s, Memory& memory, const std::vector<View>& results, Run run) {
  const auto stop = [&](const char* why) {
    std::fprintf(stderr, "%s: %s at B=%d N=%d D=%d prefix=%d\n", what, why, int(s.B), int(s.N), int(s.D), int(s.prefix));
    std::exit(1);
  };
  memory.take_results();
  run();
  if (memory.unwritten(results)) stop("a result is left unwritten");
  const auto first = memory.take_results();
  run();
  if (memory.unwritten(results)) stop("a result is left unwritten");
  // What is left over is read by the next call (h, stats), so the last run's results stay.
  std::vector<char> second;
  for (const auto& b : memory.blocks)
    if (b.result) second.insert(second.end(), b.data.get(), b.data.get() + b.size);
  if (first != second) stop("the result depends on the order of threads");
}

enum class Layout { dense, expanded, unaligned };

void run_case(Shape s, Dtype x, Dtype f, Dtype y, bool pos, Layout layout) {
  const Dtype h_type = f == Dtype::absent || f == x ? x : Dtype::f32;
  const Dtype parameter = s.D % 2 ? Dtype::f32 : x;
  const int64_t P = s.N - s.prefix;
  Memory m;
  const auto input = [&](Dtype t) {
    return layout == Layout::expanded ? m.expanded(t, s) : layout == Layout::unaligned ? m.unaligned(t, s) : m.tensor(t, s);
  };
  const View x_in = input(x), branch = f == Dtype::absent ? View{} : input(f);
  const View scale = branch ? m.vector(Dtype::f32, s.B) : View{};
  const View p = pos ? m.rows(x, P, s.D) : View{}, wp = pos ? m.vector(parameter, s.D) : View{};
  const View bp = pos && s.D % 3 ? m.vector(parameter, s.D) : View{};
  const Inputs in{s, 1e-6, 1e-5, x_in, branch, scale, m.vector(parameter, s.D), s.D % 3 ? m.vector(parameter, s.D) : View{}, p, wp, bp};

  // The backward's inputs are numbers of their own, not the forward's results.
  const View h = branch ? m.tensor(h_type, s) : x_in;
  View stats = m.rows(Dtype::f32, 2 * s.B, s.N);
  for (int64_t i = 0; i < 2 * s.B * s.N; ++i) static_cast<float*>(stats.data)[i] = 0.25f + float(i % 3);

  {
    Memory r;
    const PELayerNormOutputs out{r.tensor(y, s, true), branch ? r.tensor(h_type, s, true) : View{},
                                 pos ? r.rows(x, P, s.D, true) : View{}, r.rows(Dtype::f32, 2 * s.B, s.N, true)};
    check("pe_layer_norm_fwd", s, r, {out.y, out.h, out.pos_out, out.stats}, [&] { cuda::pe_layer_norm_fwd(in, out, nullptr); });
  }
  const Saved saved{s, 1e-5, h, stats, scale, in.weight, p, wp};
  const View dy = input(y), dh = input(h_type), dpos_out = pos ? m.rows(x, P, s.D) : View{};
  {
    Memory r;
    const Gradients grad{r.tensor(x, s, true),
                         branch ? r.tensor(f, s, true) : View{},
                         r.vector(parameter, s.D, true),
                         r.vector(parameter, s.D, true),
                         pos ? r.rows(x, P, s.D, true) : View{},
                         pos ? r.vector(parameter, s.D, true) : View{},
                         pos ? r.vector(parameter, s.D, true) : View{}};
    const std::vector<View> all{grad.x, grad.branch, grad.weight, grad.bias, grad.pos, grad.pos_weight, grad.pos_bias};
    check("pe_layer_norm_bwd", s, r, all, [&] {
      Temporary scratch;
      cuda::pe_layer_norm_bwd(saved, dy, dh, dpos_out, grad, scratch, nullptr);
    });
    const Gradients few{{}, grad.branch, {}, grad.bias, {}, {}, grad.pos_bias};
    check("pe_layer_norm_bwd, few", s, r, {few.branch, few.bias, few.pos_bias}, [&] {
      Temporary scratch;
      cuda::pe_layer_norm_bwd(saved, dy, {}, {}, few, scratch, nullptr);
    });
    const Gradients weight{{}, {}, grad.weight, {}, {}, {}, {}};
    check("pe_layer_norm_bwd, weight", s, r, {weight.weight}, [&] {
      Temporary scratch;
      cuda::pe_layer_norm_bwd(saved, dy, {}, {}, weight, scratch, nullptr);
    });
    check("pe_layer_norm_bwd, none", s, r, {}, [&] {
      Temporary scratch;
      cuda::pe_layer_norm_bwd(saved, dy, {}, {}, {}, scratch, nullptr);
    });
    if (!P) return;
    const View dout = m.rows(y, s.B, s.D), mean = m.rows(Dtype::f32, s.B, s.D);
    check("pe_norm_pool_bwd", s, r, all, [&] {
      Temporary scratch;
      cuda::pe_norm_pool_bwd(saved, dout, mean, grad, scratch, nullptr);
    });
    check("pe_norm_pool_bwd, few", s, r, {few.branch, few.bias, few.pos_bias}, [&] {
      Temporary scratch;
      cuda::pe_norm_pool_bwd(saved, dout, mean, few, scratch, nullptr);
    });
  }
  Memory r;
  const PENormPoolOutputs out{r.rows(y, s.B, s.D, true), branch ? r.tensor(h_type, s, true) : View{},
                              r.rows(Dtype::f32, 2 * s.B, s.N, true), r.rows(Dtype::f32, s.B, s.D, true)};
  check("pe_norm_pool_fwd", s, r, {out.out, out.h, out.stats, out.s}, [&] {
    Temporary scratch;
    cuda::pe_norm_pool_fwd(in, out, scratch, nullptr);
  });
  check("pe_norm_pool_fwd, out alone", s, r, {out.out}, [&] {
    Temporary scratch;
    cuda::pe_norm_pool_fwd(in, {out.out, {}, {}, {}}, scratch, nullptr);
  });
}

// A shape's B is the number of layers here, its N that of rows.
void run_chain(Shape s, Dtype x, Dtype parameter, Dtype y, bool hierarchical, Layout layout) {
  Memory m, r;
  const auto weights = [&](Memory& memory, bool result) { return memory.rows(parameter, s.B, s.D, result); };
  const PEChainInputs in{s.B, s.N, s.D, 1e-5, hierarchical, m.rows(x, s.N, s.D), weights(m, false), s.D % 3 ? weights(m, false) : View{}};
  const View out = r.tensor(y, s, true);
  const View dout = layout == Layout::expanded ? m.expanded(y, s) : layout == Layout::unaligned ? m.unaligned(y, s) : m.tensor(y, s);
  Temporary scratch;
  check("pe_chain_fwd", s, r, {out}, [&] { cuda::pe_chain_fwd(in, out, scratch, nullptr); });
  const PEChainGradients grad{r.rows(x, s.N, s.D, true), weights(r, true), weights(r, true)};
  for (int wanted = 0; wanted < 8; ++wanted) {
    const PEChainGradients g{wanted & 1 ? grad.pos : View{}, wanted & 2 ? grad.weight : View{}, wanted & 4 ? grad.bias : View{}};
    check("pe_chain_bwd", s, r, {g.pos, g.weight, g.bias}, [&] { cuda::pe_chain_bwd(in, dout, g, scratch, nullptr); });
    if (s.D > 8000 && wanted == 1) wanted = 6;  // wide rows take long here: dpos, and all
  }
}

}  // namespace

int main() {
  using D = Dtype;
  // Empty, smallest, odd; each elements-a-lane class (24, 32, 40) with part of a warp, a warp and several warps a row; the loops.
  const Shape shapes[] = {{0, 3, 8, 0},  {2, 0, 8, 0},   {1, 1, 1, 0},   {1, 1, 3, 1},   {3, 5, 7, 2},   {2, 9, 31, 0},  {5, 20, 24, 1},
                          {2, 3, 80, 0}, {9, 4, 96, 0},  {2, 5, 192, 1}, {2, 3, 320, 0}, {1, 2, 768, 0}, {1, 2, 1280, 0}, {1, 2, 1536, 0},
                          {2, 1, 2501, 0}, {1, 1, 8192, 0}, {2, 2, 8193, 1}};
  const Dtype types[][3] = {{D::f32, D::absent, D::f32}, {D::f32, D::bf16, D::bf16},   {D::bf16, D::bf16, D::bf16},  // x, branch, y
                            {D::bf16, D::f16, D::f16},   {D::f16, D::absent, D::f32}, {D::f32, D::f16, D::f16}};
  int number = 0;
  for (const Shape& s : shapes)
    for (const auto& t : types)
      for (const bool pos : {true, false}) {
        ++number;
        if (number % (s.D > 8000 ? 12 : s.D > 700 ? 5 : 1)) continue;  // wide rows take long here: some of the combinations
        const Layout layout = Layout(number / 2 % 3);
        cuda_host::device.multiprocessors = 1 + number % 4;
        cuda_host::device.shared_per_multiprocessor = number % 2 ? 228 << 10 : 100 << 10;
        cuda_host::device.shared_per_block = number % 2 ? 227 << 10 : 99 << 10;
        run_case(s, t[0], t[1], t[2], pos, layout);
      }
  for (const Shape& s : shapes)
    for (const bool hierarchical : {true, false}) {
      const auto& t = types[number++ % 6];
      run_chain(s, t[0], number % 2 ? D::f32 : t[0], t[2], hierarchical, Layout(number % 3));
    }
  std::printf("ok\n");
}
