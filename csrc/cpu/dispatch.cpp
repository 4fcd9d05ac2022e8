// Which instruction set's kernels run: the fastest that the machine has, lowered by MPVG_CPU_ISA or by use_isa().
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace mpvg {

#ifdef MPVG_X86
extern const Kernels kernels_avx512_bf16, kernels_avx512, kernels_avx2;
#endif
extern const Kernels kernels_baseline;

const Kernels* const all_kernels[] = {
#ifdef MPVG_X86
    &kernels_avx512_bf16, &kernels_avx512, &kernels_avx2,
#endif
    &kernels_baseline, nullptr};

namespace {

// Null or "" asks for the fastest; "avx512" for the faster of the two tables that it names.
const Kernels* find(const char* name) {
  for (const Kernels* const* k = all_kernels; *k; ++k)
    if ((*k)->runs_here() && (!name || !*name || !std::strncmp((*k)->isa, name, std::strlen(name)))) return *k;
  return nullptr;
}

std::atomic<const Kernels*> in_use{nullptr};

}  // namespace

const Kernels* use_isa(const char* name) {
  const Kernels* k = find(name);
  if (k) in_use = k;
  return k;
}

const Kernels& kernels() {
  if (const Kernels* k = in_use.load(std::memory_order_relaxed)) return *k;
  const Kernels* k = use_isa(std::getenv("MPVG_CPU_ISA"));
  return k ? *k : *use_isa(nullptr);
}

}  // namespace mpvg
