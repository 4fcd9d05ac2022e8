// For tests: kernels with one mistake each, and one without, to see that running on the host shows mistakes. test_cuda_host.py runs this
// program with the name of a case; it prints the kernel's results, or the error.
#include <cuda_pipeline_primitives.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>

namespace mpvg::cuda {

constexpr int kThreads = 64;
constexpr unsigned kAll = 0xffffffffu;

inline float* shared() {
  extern __shared__ uint4 dynamic_shared[];
  return reinterpret_cast<float*>(dynamic_shared);
}

// Each thread hands its number to the next one through shared memory; out[i] = i - 1.
__global__ void rotate(float* out, bool with_barrier) {
  const int i = threadIdx.x;
  shared()[(i + 1) % kThreads] = float(i);
  if (with_barrier) __syncthreads();
  out[i] = shared()[i];
}

// out[i] = the sum of the numbers of the threads of i's group of `width`
__global__ void group_sum(float* out, int width) {
  float v = float(threadIdx.x);
  for (int offset = width / 2; offset; offset /= 2) v += __shfl_xor_sync(kAll, v, offset, width);
  out[threadIdx.x] = v;
}

// The same by other shuffles and masks: only the lower half of each warp takes part.
__global__ void half_warps(float* out) {
  const int lane = threadIdx.x % 32;
  float v = float(threadIdx.x);
  if (lane < 16) {
    for (int delta = 8; delta; delta /= 2) v += __shfl_down_sync(0xffffu, v, delta, 16);
    v = __shfl_sync(0xffffu, v, 0);
    if (__ballot_sync(0xffffu, lane % 2) != 0xaaaau || __any_sync(0xffffu, lane == 16) || !__all_sync(0xffffu, lane < 16)) v = -1;
  }
  out[threadIdx.x] = v;
}

__global__ void out_of_bounds(float* out) {
  shared()[kThreads + threadIdx.x] = 0;  // the launch asked for kThreads floats
  out[threadIdx.x] = 0;
}
__global__ void divergent_barrier(float* out) {
  if (threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = 0;
}
__global__ void two_barriers(float* out) {
  if (threadIdx.x < 32) __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 0;
}
__global__ void divergent_shuffle(float* out) {
  float v = 1;
  if (threadIdx.x % 32 < 20) v = __shfl_xor_sync(kAll, v, 1);
  out[threadIdx.x] = v;
}
__global__ void shuffle_from_outside_its_mask(float* out) {
  float v = 1;
  if (threadIdx.x % 32 < 16) v = __shfl_xor_sync(0xffffu, v, 16);
  out[threadIdx.x] = v;
}
__global__ void shuffle_past_its_width(float* out) { out[threadIdx.x] = __shfl_sync(kAll, 1.0f, 9, 8); }

// out[i] = from[i], through shared memory
__global__ void copy(float* out, const float* from, bool wait, int offset) {
  float* const slot = shared() + threadIdx.x;
  __pipeline_memcpy_async(slot, reinterpret_cast<const char*>(from + threadIdx.x) + offset, 4);
  __pipeline_commit();
  if (wait) __pipeline_wait_prior(0);
  out[threadIdx.x] = *slot;
}
__global__ void unwritten(float* out) {
  if (threadIdx.x != 3) out[threadIdx.x] = 0;
}

}  // namespace mpvg::cuda

int main(int count, char** names) {
  using namespace mpvg::cuda;
  const std::string name = count > 1 ? names[1] : "";
  float out[kThreads], from[kThreads + 1];
  std::memset(out, 0xff, sizeof(out));
  for (int i = 0; i <= kThreads; ++i) from[i] = float(i);
  cudaLaunchConfig_t config;
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = sizeof(out);
  const auto run = [&](auto kernel, auto... arguments) { cudaLaunchKernelEx(&config, kernel, arguments...); };
  try {
    if (name == "barrier") run(rotate, out, true);
    else if (name == "missing_barrier") run(rotate, out, false);
    else if (name == "group_sum") run(group_sum, out, 8);
    else if (name == "half_warps") run(half_warps, out);
    else if (name == "out_of_bounds") run(out_of_bounds, out);
    else if (name == "divergent_barrier") run(divergent_barrier, out);
    else if (name == "two_barriers") run(two_barriers, out);
    else if (name == "divergent_shuffle") run(divergent_shuffle, out);
    else if (name == "shuffle_from_outside_its_mask") run(shuffle_from_outside_its_mask, out);
    else if (name == "shuffle_past_its_width") run(shuffle_past_its_width, out);
    else if (name == "copy") run(copy, out, from, true, 0);
    else if (name == "copy_without_wait") run(copy, out, from, false, 0);
    else if (name == "unaligned_copy") run(copy, out, from, true, 2);
    else if (name == "unwritten") run(unwritten, out);
    else return 2;
  } catch (const std::exception& error) {
    std::printf("error: %s\n", error.what());
    return 0;
  }
  for (const float v : out) std::printf("%g ", double(v));
}
