// The interface between the operators and the CPU kernels: a table of entry points for each instruction set.
#pragma once

#include "../arguments.h"

#if defined(__x86_64__)
#define MPVG_X86 1
#endif

namespace mpvg {

// Runs body(begin, end, context) over pieces of [0, n) of at least `grain`, on as many threads as there are.
using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t n, int64_t grain, Body body, void* context);

struct Kernels {
  const char* isa;
  bool (*runs_here)();
  void (*pe_chain_fwd)(const PEChainInputs&, View out, ParallelFor);
  void (*pe_chain_bwd)(const PEChainInputs&, View dout, const PEChainGradients&, ParallelFor);
  void (*pe_layer_norm_fwd)(const Inputs&, const PELayerNormOutputs&, ParallelFor);
  void (*pe_layer_norm_bwd)(const Saved&, View dy, View dh, View dpos_out, const Gradients&, ParallelFor);
  void (*pe_norm_pool_fwd)(const Inputs&, const PENormPoolOutputs&, ParallelFor);
  void (*pe_norm_pool_bwd)(const Saved&, View dout, View s, const Gradients&, ParallelFor);
};

// Scratch memory for one call. Each thread keeps its last large block: fresh pages cost more than writing to them.
void* take_memory(int64_t size);
void give_memory(void* memory);

// One table for each isa_*.cpp of this build, fastest first, ending with null.
extern const Kernels* const all_kernels[];

// The table in use: the fastest that this machine runs, or a lower one if asked for by name (by use_isa or MPVG_CPU_ISA).
const Kernels& kernels();

// Choose by name; null if there is no such table or the machine can't run it.
const Kernels* use_isa(const char* name);

}  // namespace mpvg
