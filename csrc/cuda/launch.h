// Host side of a launch: what depends on the device, how rows are laid over threads, how the work is cut into blocks. No torch here.
//
// Everything follows from shapes, strides and the device's fixed properties, nothing from the clock or the order of execution: results
// are the same bits from run to run.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "../arguments.h"

namespace mpvg::cuda {

// Launch choices. They follow from registers, shared memory and latency as computed for H100 and A100; none has been timed yet.
struct Rules {
  // Threads of a block whose rows take at most a warp each: four warps keep a block's tile of positions short (four rows at D = 768, 16 at
  // 192), so that the last tile of 196 or 197 tokens is not mostly empty, and many blocks make the grid's last wave an even one.
  static constexpr int threads = 128;
  // A row may take so many threads; the register kernels then reach 32 * 256 = 8192 columns, wider rows go to the loops at the end of
  // each operator's .cuh.
  static constexpr int most_threads = 256;
  static constexpr int widest = 8192;
  // With 40 elements a lane (1280 columns) there are two rows a block: registers allow 256 threads, as four blocks rather than two.
  static constexpr int threads_of_40 = 64;
  // Threads of one multiprocessor by the registers that a row kernel gets, so that none spills: 128 and 168 each for 24 and 32 elements a
  // lane, all 255 (that is 8 warps, as 9 to 12 get 168) for 40 and for types that are looked up. Grids are cut to one wave of them.
  static constexpr int resident_threads(bool whole_chunks, int per_lane) {
    return !whole_chunks || per_lane == 40 ? 256 : per_lane == 24 ? 512 : 384;
  }
  // Rows in flight for each row in work. Bandwidth times latency is 16 to 32 KB a multiprocessor on H100 (3.3 TB/s, 0.6 to 1.2 us); 512
  // threads x 48 bytes (24 elements of bf16) x 3 rows under way are 72 KB. More would only take shared memory from other blocks.
  static constexpr int most_stages = 4;
  // Samples of a block that pay for what it reads but once (its PE rows, w and b, all from L2): used to weigh one more wave against longer
  // slices.
  static constexpr double prologue_samples = 1.5;
  // fp32 partials of S batch slices are 8 S N D bytes written and read, the backward itself moves 6 B N D or more: S <= B / 8 keeps them
  // below a sixth of that, and as long as all of them stay in the L2 cache more blocks are worth more.
  static constexpr int64_t samples_per_slice = 8;
  static constexpr int64_t cached_partial_bytes = 4 << 20;
  // Chunks of a sample's tokens in the pool's forward: its second stage adds them up one by one.
  static constexpr int64_t most_chunks = 32;
  // Kernels with no more shared memory than this a block (the finishing ones) leave the L1 cache as large as it is.
  static constexpr size_t little_shared = 8 << 10;
  // The finishing kernels: a strip of 8 columns is one 32-byte sector of a row of fp32, the least that memory moves, for as many blocks as
  // possible; 64 threads walk down each column, so that 49 to 196 rows (times slices) are few steps of latency.
  static constexpr int strip = 8, strip_rows = 64, finish_threads = strip * strip_rows;
};

inline void check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that it does not surface again in the next call that asks
  throw std::runtime_error(std::string("mpvg: ") + doing + ": " + cudaGetErrorString(error));
}

// The current device's fixed properties, looked up once a thread.
struct Device {
  int index = -1, multiprocessors, shared_per_multiprocessor, shared_per_block;

  static const Device& current() {
    static thread_local Device known;
    int index;
    check(cudaGetDevice(&index), "no current CUDA device");
    if (known.index == index) return known;
    const auto get = [&](int* value, cudaDeviceAttr what) { check(cudaDeviceGetAttribute(value, what, index), "CUDA device attributes"); };
    get(&known.multiprocessors, cudaDevAttrMultiProcessorCount);
    get(&known.shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    get(&known.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    known.index = index;
    return known;
  }
};

// Lets a kernel have all the shared memory that the device has, once a kernel, device and thread: more than 48 KB it has to ask for, and
// left to itself the driver may give most of the memory to the L1 cache, which rows on their way do not go through.
inline cudaError_t allow_shared_memory(const void* kernel) {
  static thread_local std::set<std::pair<const void*, int>> known;
  const Device& device = Device::current();
  if (!known.insert({kernel, device.index}).second) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
  return error ? error : cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
}

// The one way to start a kernel. An empty grid (an empty tensor) is no launch.
template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, cudaStream_t stream,
            const Parameters&... arguments) {
  if (blocks == 0) return;
  cudaError_t error = blocks > 0x7fffffff ? cudaErrorInvalidConfiguration : cudaSuccess;
  if (error == cudaSuccess && shared_bytes > Rules::little_shared) error = allow_shared_memory(reinterpret_cast<const void*>(kernel));
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    error = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error("mpvg: the CUDA kernel " + std::string(name) + " could not be launched (" + std::to_string(blocks) +
                           " blocks of " + std::to_string(threads) + " threads, " + std::to_string(shared_bytes) +
                           " bytes of shared memory): " + cudaGetErrorString(error));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How rows of D elements lie over a block's threads: `lanes` threads a row, a power of two, each with `per_lane` elements in registers.
// 24, 32 and 40 times a power of two are the widths of every common ViT (192, 384, 768; 256, 512, 1024; 1280), so that no lane idles; other
// widths leave a quarter of the lanes idle at worst (half of them for `any`, which is compiled for 32 alone).
struct RowTile {
  int per_lane, lanes, rows, threads, resident_threads;

  RowTile(int64_t D, bool any) {
    int64_t least = 0;
    for (const int p : {24, 32, 40}) {
      if (any && p != 32) continue;
      int64_t l = 1;
      while (l * p < D) l *= 2;
      if (!least || l * p < least) least = l * p, per_lane = p, lanes = int(l);
    }
    // A row of several warps has a block to itself: its sums are barriers.
    threads = lanes > 32 ? lanes : per_lane == 40 ? Rules::threads_of_40 : Rules::threads;
    rows = threads / lanes;
    resident_threads = Rules::resident_threads(!any, per_lane);
  }
};

// The shared memory of a block that keeps `stages` stages of rows in flight beside `fixed` bytes, and the blocks that one wave holds.
struct Occupancy {
  int stages;
  size_t shared_bytes;
  int64_t wave;
  bool fits;  // else the device has too little for rows of this width: the loops are for it

  Occupancy(const RowTile& tile, size_t stage_bytes, size_t fixed_bytes) {
    const Device& device = Device::current();
    const int64_t blocks = std::max(1, tile.resident_threads / tile.threads), reserved = 1 << 10;  // CUDA takes 1 KB a block
    const auto fits_in = [&](int64_t n, int64_t limit) { return int64_t(fixed_bytes + n * stage_bytes) <= limit; };
    stages = Rules::most_stages;
    while (stages > 2 && !fits_in(stages, device.shared_per_multiprocessor / blocks - reserved)) --stages;
    while (stages > 1 && !fits_in(stages, device.shared_per_block)) --stages;
    shared_bytes = fixed_bytes + stages * stage_bytes;
    fits = fits_in(1, device.shared_per_block);
    const int64_t fit = device.shared_per_multiprocessor / int64_t(shared_bytes + reserved);
    wave = device.multiprocessors * std::max<int64_t>(1, std::min(blocks, fit));
  }
};

// `count` items in `slices` slices of `length`, the last one perhaps shorter, each to be worked on by `tiles` blocks, in waves of `wave`
// blocks. Fewest item times in a row, the prologue counted, for up to four waves; at most `at_most` slices.
struct Slices {
  int64_t slices = 1, length = 1;

  Slices(int64_t count, int64_t tiles, int64_t wave, int64_t at_most) {
    double least = 0;
    for (int64_t waves = 1; waves <= 4; ++waves) {
      const int64_t s = std::max<int64_t>(1, std::min({count, at_most, waves * wave / std::max<int64_t>(1, tiles)}));
      const int64_t l = std::max<int64_t>(1, ceil_div(count, s)), used = std::max<int64_t>(1, ceil_div(count, l));
      const double time = double(std::max<int64_t>(1, ceil_div(used * tiles, wave))) * (double(l) + Rules::prologue_samples);
      if (least == 0 || time < least) least = time, slices = used, length = l;
    }
  }
};

}  // namespace mpvg::cuda
