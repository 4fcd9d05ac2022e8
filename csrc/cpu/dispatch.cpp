// What the kernels of all instruction sets share: which of them run (the fastest that the machine has, lowered by MPVG_CPU_ISA or by
// use_isa()), and scratch memory.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

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

// Below this, malloc recycles by itself; above, nothing is kept.
constexpr int64_t kKeepFrom = 64 << 10, kKeepUpTo = 16 << 20;

struct Kept {
  void* memory = nullptr;
  int64_t size = 0;
  bool lent = false;
  ~Kept() { std::free(memory); }
};
thread_local Kept kept;

void* allocate(int64_t size) {
  void* memory = std::malloc(size);
  if (!memory) throw std::bad_alloc();
  return memory;
}

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

void* take_memory(int64_t size) {
  if (size < kKeepFrom || size > kKeepUpTo || kept.lent) return allocate(size);
  if (kept.size < size) {
    std::free(kept.memory);
    kept.memory = nullptr, kept.size = 0;
    kept.memory = allocate(size), kept.size = size;
  }
  kept.lent = true;
  return kept.memory;
}

void give_memory(void* memory) {
  if (memory == kept.memory) {
    kept.lent = false;
  } else {
    std::free(memory);
  }
}

}  // namespace mpvg
