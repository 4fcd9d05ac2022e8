// Runs every CPU kernel, without torch, on odd shapes, strides and dtypes: test_sanitizers.py compiles it with address and
// undefined-behaviour sanitizers. Tensors are allocated to the byte, so that a step outside of one is seen, and start anywhere.
//
// Each call is made twice, the work in one piece and in pieces of one unit, last one first, as threads might do it: the results must
// be the same bits. Prints one line for each instruction set.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../csrc/cpu/kernels.h"

using namespace mpvg;

namespace {

void in_one_piece(int64_t n, int64_t, Body body, void* context) { body(0, n, context); }
void backwards(int64_t n, int64_t, Body body, void* context) {
  for (int64_t i = n; i-- > 0;) body(i, i + 1, context);
}

std::mt19937 random_bits(0);
// Whether numbers are all positive: rows then have a mean larger than their deviation.
bool one_sign = false;

// A tensor's memory, filled with numbers of magnitude 0.5 to 4 (or zeros), and views of it.
struct Memory {
  int64_t shift = 0;  // elements that each tensor starts past an aligned address
  std::vector<std::unique_ptr<char[]>> blocks;
  std::vector<std::pair<char*, size_t>> outputs;

  View make(Dtype dtype, int64_t elements, int64_t stride_b, int64_t stride_n, bool output) {
    const size_t size = elements * bytes(dtype);
    blocks.emplace_back(new char[shift * bytes(dtype) + size]);
    char* p = blocks.back().get() + shift * bytes(dtype);
    std::memset(p, 0, size);
    for (int64_t i = 0; i < elements && !output; ++i) {
      const double value = std::ldexp(1 + random_bits() % 128 / 128.0, int(random_bits() % 3) - 1) * (random_bits() % 2 || one_sign ? 1 : -1);
      const float single = float(value);
      uint32_t bits;
      std::memcpy(&bits, &single, 4);
      const uint16_t bf16 = uint16_t(bits >> 16);
      const uint16_t f16 = uint16_t((bits >> 16 & 0x8000) | ((bits >> 13 & 0x3fc00) - (112 << 10)) | (bits >> 13 & 0x3ff));
      switch (dtype) {
        case Dtype::f64: std::memcpy(p + 8 * i, &value, 8); break;
        case Dtype::f32: std::memcpy(p + 4 * i, &single, 4); break;
        case Dtype::bf16: std::memcpy(p + 2 * i, &bf16, 2); break;
        default: std::memcpy(p + 2 * i, &f16, 2);
      }
    }
    if (output) outputs.emplace_back(p, size);
    return {p, dtype, stride_b, stride_n};
  }
  View vector(Dtype t, int64_t D, bool output = false) { return make(t, D, 0, 0, output); }
  View rows(Dtype t, int64_t N, int64_t D, bool output = false) { return make(t, N * D, 0, D, output); }
  View tensor(Dtype t, const Shape& s, bool output = false) { return make(t, s.B * s.N * s.D, s.N * s.D, s.D, output); }
  View expanded(Dtype t, const Shape& s) { return make(t, s.D, 0, 0, false); }  // one row for all

  std::vector<std::vector<char>> results() const {
    std::vector<std::vector<char>> copies;
    for (const auto& [p, size] : outputs) copies.emplace_back(p, p + size);
    return copies;
  }
};

template <class Run>
void check(const char* what, const Shape& s, const Memory& memory, Run run) {
  run(in_one_piece);
  const auto first = memory.results();
  run(backwards);
  if (first == memory.results()) return;
  std::fprintf(stderr, "%s differs with the order of units at B=%d N=%d D=%d\n", what, int(s.B), int(s.N), int(s.D));
  std::exit(1);
}

// Whether a PE is given, and whether it is normalised already.
enum class Pos { none, raw, normed };

// pe_chain with B layers on N rows; expand: one row of pos, and of the gradient, for all.
void run_chain(const Kernels& kernels, Shape s, Dtype x, Dtype y, bool hierarchical, bool expand) {
  const Dtype wide = x == Dtype::f64 ? x : Dtype::f32;
  Memory m;
  const View p = expand ? m.expanded(x, s) : m.rows(x, s.N, s.D), w = m.rows(wide, s.B, s.D), b = expand ? View{} : m.rows(wide, s.B, s.D);
  const PEChainInputs in{s.B, s.N, s.D, 1e-6, hierarchical, p, w, b};
  const View out = m.tensor(y, s, true), dout = expand ? m.expanded(y, s) : m.tensor(y, s);
  check("pe_chain_fwd", s, m, [&](ParallelFor f) { kernels.pe_chain_fwd(in, out, f); });
  const PEChainGradients grad{m.rows(x, s.N, s.D, true), m.rows(wide, s.B, s.D, true), b ? m.rows(wide, s.B, s.D, true) : View{}};
  check("pe_chain_bwd", s, m, [&](ParallelFor f) { kernels.pe_chain_bwd(in, dout, grad, f); });
  check("pe_chain_bwd", s, m, [&](ParallelFor f) { kernels.pe_chain_bwd(in, dout, {{}, grad.weight, {}}, f); });
}

void run_case(const Kernels& kernels, Shape s, Dtype x, Dtype f, Dtype y, Pos given, bool expand, int64_t shift = 0) {
  const bool pos = given != Pos::none, norm = given == Pos::raw;
  const Dtype wide = x == Dtype::f64 ? x : Dtype::f32, h_type = f == Dtype::absent || f == x ? x : wide;
  const int64_t P = s.N - s.prefix;
  const Dtype of_weight = expand ? x : wide, of_pos = expand ? wide : x;
  Memory m;
  m.shift = shift;
  const View input = expand ? m.expanded(x, s) : m.tensor(x, s);
  const View branch = f == Dtype::absent ? View{} : m.tensor(f, s), scale = branch ? m.vector(wide, s.B) : View{};
  const View h = branch ? m.tensor(h_type, s, true) : input, stats = m.rows(wide, 2 * s.B, s.N, true);
  const View p = pos ? m.rows(of_pos, P, s.D) : View{}, wp = norm ? m.vector(of_pos, s.D) : View{}, bp = norm ? m.vector(of_pos, s.D) : View{};
  const Inputs in{s, 1e-6, 1e-5, input, branch, scale, m.vector(of_weight, s.D), m.vector(of_weight, s.D), p, wp, bp};
  const View no_h = branch ? h : View{};
  const PELayerNormOutputs out{m.tensor(y, s, true), no_h, norm ? m.rows(of_pos, P, s.D, true) : View{}, stats};
  check("pe_layer_norm_fwd", s, m, [&](ParallelFor f) { kernels.pe_layer_norm_fwd(in, out, f); });

  const Saved saved{s, 1e-5, h, stats, scale, in.weight, p, wp};
  const Gradients grad{m.tensor(x, s, true),
                       branch ? m.tensor(f, s, true) : View{},
                       m.vector(of_weight, s.D, true),
                       m.vector(of_weight, s.D, true),
                       pos ? m.rows(of_pos, P, s.D, true) : View{},
                       norm ? m.vector(of_pos, s.D, true) : View{},
                       norm ? m.vector(of_pos, s.D, true) : View{}};
  const View dy = expand ? m.expanded(y, s) : m.tensor(y, s), dh = m.tensor(h_type, s), dpos_out = norm ? m.rows(of_pos, P, s.D) : View{};
  check("pe_layer_norm_bwd", s, m, [&](ParallelFor f) { kernels.pe_layer_norm_bwd(saved, dy, dh, dpos_out, grad, f); });
  const Gradients few{{}, grad.branch, {}, grad.bias, {}, {}, grad.pos_bias};
  check("pe_layer_norm_bwd", s, m, [&](ParallelFor f) { kernels.pe_layer_norm_bwd(saved, dy, {}, {}, few, f); });
  if (!P) return;

  const PENormPoolOutputs pooled{m.rows(y, s.B, s.D, true), no_h, stats, m.rows(wide, s.B, s.D, true)};
  check("pe_norm_pool_fwd", s, m, [&](ParallelFor f) { kernels.pe_norm_pool_fwd(in, pooled, f); });
  check("pe_norm_pool_fwd", s, m, [&](ParallelFor f) { kernels.pe_norm_pool_fwd(in, {pooled.out, {}, {}, {}}, f); });
  const View dout = m.rows(y, s.B, s.D);
  check("pe_norm_pool_bwd", s, m, [&](ParallelFor f) { kernels.pe_norm_pool_bwd(saved, dout, pooled.s, grad, f); });
}

}  // namespace

int main() {
  const Shape shapes[] = {{0, 3, 8, 0},  {2, 0, 8, 0},  {1, 1, 1, 0},  {1, 1, 3, 1},   {3, 5, 7, 2},
                          {2, 9, 31, 0}, {5, 4, 33, 1}, {4, 7, 64, 0}, {35, 3, 20, 0}, {2, 70, 192, 1},
                          {5, 9, 32, 2}, {9, 6, 96, 3}, {2, 4, 40, 4}, {6, 1, 64, 0}};
  const Dtype types[][3] = {{Dtype::f32, Dtype::absent, Dtype::f32}, {Dtype::f32, Dtype::bf16, Dtype::bf16},  // x, branch, y
                            {Dtype::bf16, Dtype::bf16, Dtype::bf16}, {Dtype::bf16, Dtype::f16, Dtype::f16},
                            {Dtype::f16, Dtype::absent, Dtype::f32}, {Dtype::f64, Dtype::f64, Dtype::f64}};
  for (const Kernels* const* k = all_kernels; *k; ++k) {
    if (!(*k)->runs_here()) continue;
    for (const Shape& s : shapes)
      for (const auto& t : types)
        for (const Pos pos : {Pos::none, Pos::raw, Pos::normed})
          for (const bool expand : {false, true}) {
            one_sign = expand != (pos != Pos::none);
            run_case(**k, s, t[0], t[1], t[2], pos, expand);
            if (s.B && pos != Pos::none) run_chain(**k, s, t[0], t[2], pos == Pos::raw, expand);
          }
    // Every mix of dtypes, and tensors that start at every element of a vector: ragged rows, and groups of whole vectors.
    int64_t shift = 0;
    const Dtype none = Dtype::absent, all[] = {Dtype::f32, Dtype::bf16, Dtype::f16};
    for (const Shape& s : {Shape{3, 5, 19, 2}, Shape{5, 3, 32, 1}})
      for (const Dtype x : all)
        for (const Dtype f : {none, all[0], all[1], all[2]})
          for (const Dtype y : all)
            for (const bool expand : {false, true}) run_case(**k, s, x, f, y, Pos::raw, expand, ++shift % 16);
    for (shift = 0; shift < 8; ++shift) run_case(**k, {3, 5, 16, 2}, Dtype::f64, Dtype::f64, Dtype::f64, Pos::raw, false, shift);
    // Above the size from which outputs are streamed.
    run_case(**k, {9, 1900, 192, 0}, Dtype::f32, Dtype::absent, Dtype::f32, Pos::raw, false);
    std::printf("%s ok\n", (*k)->isa);
  }
}
