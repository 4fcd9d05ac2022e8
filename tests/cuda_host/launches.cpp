// For benchmarks/resources_cuda.py: which kernels the launchers start, with how many threads and how much shared memory, for a ViT's calls
// on several GPUs. Nothing runs. Prints a line a launch: GPU's architecture, operator, direction, dtype, D, the kernel's address, blocks,
// threads, bytes of shared memory.
#include <cstdio>

#include "../../csrc/cuda/dtypes.cuh"
#include "../../csrc/cuda/kernels.h"

using namespace mpvg;

int main() {
  // Multiprocessors and KB of shared memory of A100, H100 and B200.
  const struct {
    int arch, multiprocessors, shared;
  } gpus[] = {{80, 108, 164}, {90, 132, 228}, {100, 148, 228}};
  const struct {
    const char* name;
    Dtype x, f, y, parameter;
  } mixes[] = {{"fp32", Dtype::f32, Dtype::f32, Dtype::f32, Dtype::f32},
               {"bf16", Dtype::bf16, Dtype::bf16, Dtype::bf16, Dtype::f32},
               {"fp16", Dtype::f16, Dtype::f16, Dtype::f16, Dtype::f32},
               {"fp32+bf16", Dtype::f32, Dtype::bf16, Dtype::bf16, Dtype::f32},
               {"fp32+fp16", Dtype::f32, Dtype::f16, Dtype::f16, Dtype::f32}};
  static char prefix[128];
  cuda_host::instead_of_running = [](const void* kernel, dim3 grid, dim3 block, size_t shared) {
    std::printf("%s %p %u %u %zu\n", prefix, kernel, grid.x, block.x, shared);
  };
  const cuda::Scratch scratch{[](int64_t, void*) -> void* { return reinterpret_cast<void*>(4096); }, nullptr};
  for (const auto& gpu : gpus)
    for (const auto& mix : mixes)
      for (const int64_t D : {192, 384, 768, 1280}) {
        cuda_host::device = {gpu.multiprocessors, gpu.shared << 10, (gpu.shared - 1) << 10};
        const Shape s{256, 196, D, 0};
        void* const anywhere = reinterpret_cast<void*>(4096);
        const auto tensor = [&](Dtype t) { return View{anywhere, t, s.N * D, D}; };
        const auto rows = [&](Dtype t) { return View{anywhere, t, 0, D}; };
        const View parameter{anywhere, mix.parameter, 0, 0}, p = rows(mix.parameter), stats{anywhere, Dtype::f32, 0, s.N};
        const auto say = [&](const char* op, const char* direction) {
          std::snprintf(prefix, sizeof(prefix), "%d %s %s %s %d", gpu.arch, op, direction, mix.name, int(D));
        };
        const Inputs in{s, 1e-6, 1e-6, tensor(mix.x), tensor(mix.f), parameter, parameter, parameter, p, parameter, parameter};
        const Saved saved{s, 1e-6, tensor(mix.x), stats, parameter, parameter, p, parameter};
        const Gradients grad{tensor(mix.x), tensor(mix.f), parameter, parameter, p, parameter, parameter};
        say("pe_layer_norm", "forward");
        cuda::pe_layer_norm_fwd(in, {tensor(mix.y), tensor(mix.x), p, stats}, nullptr);
        say("pe_layer_norm", "backward");
        cuda::pe_layer_norm_bwd(saved, tensor(mix.y), tensor(mix.x), p, grad, scratch, nullptr);
        say("pe_norm_pool", "forward");
        cuda::pe_norm_pool_fwd(in, {rows(mix.y), tensor(mix.x), stats, rows(Dtype::f32)}, scratch, nullptr);
        say("pe_norm_pool", "backward");
        cuda::pe_norm_pool_bwd(saved, rows(mix.y), rows(Dtype::f32), grad, scratch, nullptr);
        const PEChainInputs chain{12, s.N, D, 1e-6, true, rows(mix.x), rows(mix.parameter), rows(mix.parameter)};
        say("pe_chain", "forward");
        cuda::pe_chain_fwd(chain, tensor(mix.y), scratch, nullptr);
        say("pe_chain", "backward");
        cuda::pe_chain_bwd(chain, tensor(mix.y), {rows(mix.x), rows(mix.parameter), rows(mix.parameter)}, scratch, nullptr);
      }
}
