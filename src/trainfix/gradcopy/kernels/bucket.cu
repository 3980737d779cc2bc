// The sum of bucket.py in CUDA C++, from the same table, for GPUs without Triton. One source is one variant:
//   GRADIENT_BF16 or GRADIENT_FP16: the gradient's type, else float32
//   FIRST:   the gradient is stored; else it is added
//   ALIGNED: rows begin and end at multiples of 16 bytes on both sides
//   SQUARES: the sums of squares are taken
// No header is included: neither NVRTC nor the user need have any.

// A type comes first: some releases of torch put `extern "C"` before this text.
typedef unsigned int word;

#define THREADS 256
#ifdef ALIGNED
#define BLOCK 4096
#else
#define BLOCK 2048
#endif

#if defined(GRADIENT_BF16)
typedef unsigned short gradient_type;
__device__ __forceinline__ float widen(gradient_type bits) { return __uint_as_float((word)bits << 16); }
#elif defined(GRADIENT_FP16)
typedef unsigned short gradient_type;
__device__ __forceinline__ float widen(gradient_type bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
#else
typedef float gradient_type;
__device__ __forceinline__ float widen(gradient_type value) { return value; }
#endif

// What a thread moves at once. Aligned: 16 bytes of the gradient, and as many elements of the destination.
#ifdef ALIGNED
#define VECTOR (16 / (int)sizeof(gradient_type))
struct __align__(16) gradient_vector { gradient_type of[VECTOR]; };
struct __align__(16) destination_vector { float of[4]; };
#define DESTINATIONS (VECTOR / 4)
#else
#define VECTOR 1
struct gradient_vector { gradient_type of[1]; };
struct destination_vector { float of[1]; };
#define DESTINATIONS 1
#endif
#define PER_VECTOR (VECTOR / DESTINATIONS)
#define STEPS (BLOCK / (THREADS * VECTOR))

// table: [rows, 4] of {gradient offset, destination offset, elements, place in squares}
extern "C" __global__ void __launch_bounds__(THREADS)
add_rows(const gradient_type *__restrict__ gradient, float *__restrict__ destination,
         const long long *__restrict__ table, double *__restrict__ squares, int rows) {
#ifdef SQUARES
  __shared__ double of_warps[THREADS / 32];
#endif
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    const long long *entry = table + 4LL * row;
    const gradient_type *source = gradient + entry[0];
    float *place = destination + entry[1];
    const int count = (int)entry[2];

    // All loads before the first store, so that they are under way together.
    gradient_vector addend[STEPS];
    destination_vector total[STEPS][DESTINATIONS];
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const int at = (step * THREADS + (int)threadIdx.x) * VECTOR;
      if (at >= count) continue;
      addend[step] = *(const gradient_vector *)(source + at);
#ifndef FIRST
#pragma unroll
      for (int part = 0; part < DESTINATIONS; ++part)
        total[step][part] = *(const destination_vector *)(place + at + part * PER_VECTOR);
#endif
    }

#ifdef SQUARES
    double square = 0.0;
#endif
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const int at = (step * THREADS + (int)threadIdx.x) * VECTOR;
      if (at >= count) continue;
#pragma unroll
      for (int part = 0; part < DESTINATIONS; ++part) {
#pragma unroll
        for (int lane = 0; lane < PER_VECTOR; ++lane) {
          const float value = widen(addend[step].of[part * PER_VECTOR + lane]);
#ifdef FIRST
          total[step][part].of[lane] = value;  // not added to zero: 0 + -0 is 0
#else
          total[step][part].of[lane] += value;
#endif
#ifdef SQUARES
          const double wide = (double)total[step][part].of[lane];
          square += wide * wide;
#endif
        }
        *(destination_vector *)(place + at + part * PER_VECTOR) = total[step][part];
      }
    }

#ifdef SQUARES
    // In one order always: the lanes of a warp, then the warps.
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
      square += __shfl_xor_sync(0xffffffffu, square, distance);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = square;
    __syncthreads();
    if (threadIdx.x == 0) {
      double sum = 0.0;
      for (int warp = 0; warp < THREADS / 32; ++warp) sum += of_warps[warp];
      squares[entry[3]] = sum;
    }
    __syncthreads();  // of_warps is free for the next row as soon as every thread is here
#endif
  }
}
