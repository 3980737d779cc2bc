// What bucket.cu uses of CUDA, for g++: every thread of a block is a thread of the host, blocks run one after the other.
#include <barrier>
#include <cstring>
#include <thread>
#include <vector>

struct index_type { int x; };
static thread_local index_type threadIdx;
static thread_local index_type blockIdx;
static thread_local index_type gridDim;
static const int block_threads = 256;
static std::barrier<> block_barrier(block_threads);
static double exchanged[block_threads];

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __syncthreads() block_barrier.arrive_and_wait()

static inline float __uint_as_float(unsigned int bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// As the PTX instruction that bucket.cu has: exact, subnormals too.
static inline float half_to_float(unsigned short bits) {
  _Float16 half;
  std::memcpy(&half, &bits, sizeof half);
  return (float)half;
}
#define asm(...) value = half_to_float(bits)

static inline double __shfl_xor_sync(unsigned int, double mine, int distance) {
  exchanged[threadIdx.x] = mine;
  __syncthreads();
  const double other = exchanged[threadIdx.x ^ distance];
  __syncthreads();
  return other;
}

template <typename Kernel, typename... Arguments>
static void on_threads(Kernel kernel, int blocks, Arguments... arguments) {
  std::vector<std::thread> threads;
  for (int thread = 0; thread < block_threads; ++thread)
    threads.emplace_back([=] {
      for (int block = 0; block < blocks; ++block) {
        threadIdx.x = thread, blockIdx.x = block, gridDim.x = blocks;
        kernel(arguments...);
        block_barrier.arrive_and_wait();
      }
    });
  for (auto &thread : threads) thread.join();
}
