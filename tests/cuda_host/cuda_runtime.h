// For tests: CUDA on the host. Stands in for the toolkit's header of this name, so that g++ compiles the kernels' own source (-x c++, this
// folder first on the include path) and cudaLaunchKernelEx runs them: block after block, a block's threads as fibers of one thread.
//
// What it does more than a GPU, so that mistakes show:
//   - threads of a block run in an order that is shuffled at each barrier and block, by a seed (CUDA_HOST_SEED)
//   - shared memory is filled with NaN patterns before each block, and past the launch's size it is out of bounds to address sanitizer
//   - an asynchronous copy reads its source as late as it may, at the wait for it; until then its target holds NaN patterns
//   - a barrier or shuffle that some threads never reach, that threads reach at different places, or that names a lane that is not there is
//     an error that says where everybody waits
// It proves arithmetic, indexing and barriers. It says nothing about speed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the fiber that runs

using std::max;
using std::min;

// --- fibers.cpp ---

namespace cuda_host {

struct Site {
  const char* what;
  const char* file;
  int line;
};

// What a launch may take; set by tests to make grids of other shapes.
struct Properties {
  int multiprocessors = 3, shared_per_multiprocessor = 164 << 10, shared_per_block = 163 << 10;
};
inline Properties device;

// Set: launches are told to this function and not run.
inline void (*instead_of_running)(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes) = nullptr;

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);
void barrier(Site);
// Waits for the lanes of `mask` and gives back the value that lane `source` brought; with `source` -1 a bit for each value that is not 0.
uint64_t exchange(unsigned mask, uint64_t value, int source, Site);
void copy_async(void* to, const void* from, size_t size, size_t zeros);
void copy_commit();
void copy_wait(size_t prior);
void fail(const char* message, Site);  // does not come back (but is no [[noreturn]]: address sanitizer would look for the thread's stack)

constexpr size_t kSharedBytes = 227 << 10;

template <class T>
T shuffle(unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) <= 8, "shuffles move 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
inline int lane() { return threadIdx.x % 32; }
inline void check_width(int width, Site site) {
  if (width < 1 || width > 32 || (width & (width - 1))) fail("the width of a shuffle is not a power of two up to 32", site);
}

}  // namespace cuda_host

namespace mpvg::cuda {
alignas(128) inline uint4 dynamic_shared[cuda_host::kSharedBytes / sizeof(uint4)];
}

// --- what kernels call ---

#define CUDA_HOST_SITE() const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define CUDA_HOST_AT(name) cuda_host::Site { name, file, line }

inline void __syncthreads(CUDA_HOST_SITE()) { cuda_host::barrier(CUDA_HOST_AT("__syncthreads")); }
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_HOST_SITE()) { cuda_host::exchange(mask, 0, -1, CUDA_HOST_AT("__syncwarp")); }
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_HOST_SITE()) {
  return unsigned(cuda_host::exchange(mask, predicate != 0, -1, CUDA_HOST_AT("__ballot_sync")));
}
inline int __any_sync(unsigned mask, int predicate, CUDA_HOST_SITE()) {
  return cuda_host::exchange(mask, predicate != 0, -1, CUDA_HOST_AT("__any_sync")) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_HOST_SITE()) {
  return cuda_host::exchange(mask, predicate != 0, -1, CUDA_HOST_AT("__all_sync")) == mask;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, CUDA_HOST_SITE()) {
  const auto site = CUDA_HOST_AT("__shfl_xor_sync");
  cuda_host::check_width(width, site);
  if (lane_mask < 0 || lane_mask >= width) cuda_host::fail("the lane mask of a shuffle leaves its width", site);
  return cuda_host::shuffle(mask, value, cuda_host::lane() ^ lane_mask, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_HOST_SITE()) {
  const auto site = CUDA_HOST_AT("__shfl_down_sync");
  cuda_host::check_width(width, site);
  const int lane = cuda_host::lane();
  return cuda_host::shuffle(mask, value, lane % width + int(delta) < width ? lane + int(delta) : lane, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_HOST_SITE()) {
  const auto site = CUDA_HOST_AT("__shfl_up_sync");
  cuda_host::check_width(width, site);
  const int lane = cuda_host::lane();
  return cuda_host::shuffle(mask, value, lane % width >= int(delta) ? lane - int(delta) : lane, site);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_HOST_SITE()) {
  const auto site = CUDA_HOST_AT("__shfl_sync");
  cuda_host::check_width(width, site);
  if (source < 0 || source >= width) cuda_host::fail("a shuffle reads a lane outside of its width", site);
  return cuda_host::shuffle(mask, value, cuda_host::lane() / width * width + source, site);
}

// --- what launchers call ---

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidConfiguration = 9;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t e) { return e == cudaSuccess ? "no error" : "invalid configuration argument"; }
inline cudaError_t cudaGetDevice(int* index) {
  static int calls = 0;
  *index = ++calls;  // a device never seen before: its properties are asked for in each call, as tests change them
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
  const cuda_host::Properties& d = cuda_host::device;
  *value = what == cudaDevAttrMultiProcessorCount ? d.multiprocessors
           : what == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? d.shared_per_multiprocessor : d.shared_per_block;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute what, int value) {
  const int most = what == cudaFuncAttributeMaxDynamicSharedMemorySize ? cuda_host::device.shared_per_block : 100;
  return value > most ? cudaErrorInvalidConfiguration : cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  if (config->gridDim.x == 0 || config->blockDim.x == 0 || config->blockDim.x > 1024) return cudaErrorInvalidConfiguration;
  if (config->dynamicSmemBytes > size_t(cuda_host::device.shared_per_block)) return cudaErrorInvalidConfiguration;
  if (cuda_host::instead_of_running)
    cuda_host::instead_of_running(reinterpret_cast<const void*>(kernel), config->gridDim, config->blockDim, config->dynamicSmemBytes);
  else
    cuda_host::run(config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] { kernel(arguments...); });
  return cudaSuccess;
}
