/* Gradients into a float32 master gradient on the host, in one pass: widen, store or add, sum of squares.

   Every element is one float32 addition, as torch does it: the same bits on every processor. Needs
   -ffp-contract=off and must not be built with -ffast-math. Nothing here touches Python while it works, so it may be
   called with the interpreter's lock released, and by several threads at once on stretches that do not overlap.
   Addresses need no alignment. */

#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Counts changes of what the exported functions take and mean. trainfix/gradcopy/native.py has the same number. */
#define ABI 1

#if defined(__GNUC__)
#define EXPORTED __attribute__((visibility("default")))
#define INLINED static inline __attribute__((always_inline))
#else
#define EXPORTED
#define INLINED static inline
#endif

/* One body for every x86-64 and one for those with AVX2, chosen when the library is loaded. That takes ifunc, which
   glibc has. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx2", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

enum dtype { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

/* Squares are summed in LANES columns within a block, then the columns in a fixed order, then the blocks from first to
   last. The widths are part of the result: vectors of any length give the same bits. */
enum { LANES = 16, BLOCK = 4096 };

INLINED float from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINED uint32_t to_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINED float widen_float32(const unsigned char *from)
{
    float value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINED float widen_bfloat16(const unsigned char *from)
{
    uint16_t half;
    memcpy(&half, from, sizeof half);
    return from_bits((uint32_t)half << 16);
}

/* Exact for every pattern. Everything is computed and then chosen from, so that it vectorises. No float32 subnormal
   appears on the way, so flush-to-zero changes nothing. */
INLINED float widen_float16(const unsigned char *from)
{
    uint16_t half;
    memcpy(&half, from, sizeof half);
    const uint32_t magnitude = half & 0x7fffu;
    const uint32_t normal = (magnitude << 13) + (112u << 23);                 /* the exponent's bias: 15 -> 127 */
    const uint32_t subnormal = to_bits((float)(int32_t)magnitude * 0x1p-24f); /* they count in 2^-24 */
    const uint32_t not_finite = magnitude >= 0x7c00 ? 112u << 23 : 0;         /* the largest exponent: 31 -> 255 */
    const uint32_t quiet = magnitude > 0x7c00 ? 0x00400000u : 0;              /* as a processor widens a NaN */
    const uint32_t widened = magnitude < 0x0400 ? subnormal : (normal + not_finite) | quiet;
    return from_bits((half & 0x8000u) << 16 | widened);
}

INLINED float widen(enum dtype dtype, const unsigned char *from)
{
    switch (dtype) {
    case BFLOAT16: return widen_bfloat16(from);
    case FLOAT16: return widen_float16(from);
    default: return widen_float32(from);
    }
}

INLINED float at(const unsigned char *values, size_t index)
{
    return widen_float32(values + 4 * index);
}

INLINED double sum_of_squares(const unsigned char *values, size_t count)
{
    double lanes[LANES] = {0.0};
    size_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (size_t lane = 0; lane < LANES; lane++) {
            const double value = at(values, i + lane);
            lanes[lane] += value * value; /* the product is exact in double */
        }
    for (size_t lane = 0; i < count; i++, lane++) {
        const double value = at(values, i);
        lanes[lane] += value * value;
    }
    for (size_t half = LANES / 2; half > 0; half /= 2)
        for (size_t lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
    return lanes[0];
}

INLINED void block(enum dtype dtype, int first, unsigned char *restrict to, const unsigned char *restrict from,
                   size_t count)
{
    const size_t width = dtype == FLOAT32 ? 4 : 2;
    for (size_t i = 0; i < count; i++) {
        float value = widen(dtype, from + width * i);
        if (!first) value = at(to, i) + value;
        memcpy(to + 4 * i, &value, sizeof value);
    }
}

/* dtype and first are constants where this is inlined: each combination becomes a loop of its own. */
INLINED void pass(enum dtype dtype, int first, unsigned char *to, const unsigned char *from, size_t count,
                  double *squares)
{
    if (squares == NULL) {
        block(dtype, first, to, from, count);
        return;
    }
    const size_t width = dtype == FLOAT32 ? 4 : 2;
    double total = 0.0;
    for (size_t begin = 0; begin < count; begin += BLOCK) {
        const size_t length = count - begin < BLOCK ? count - begin : BLOCK;
        block(dtype, first, to + 4 * begin, from + width * begin, length);
        total += sum_of_squares(to + 4 * begin, length); /* what was just stored is still in the nearest cache */
    }
    *squares = total;
}

#define PASSES(widened)                                                                                               \
    case widened:                                                                                                     \
        if (first)                                                                                                    \
            pass(widened, 1, to, from, count, squares);                                                               \
        else                                                                                                          \
            pass(widened, 0, to, from, count, squares);                                                               \
        return 0;

FOR_EACH_PROCESSOR
static int add(unsigned char *to, const unsigned char *from, size_t count, int dtype, int first, double *squares)
{
    switch (dtype) {
    PASSES(FLOAT32)
    PASSES(BFLOAT16)
    PASSES(FLOAT16)
    default: return -1;
    }
}

EXPORTED int trainfix_native_abi(void)
{
    return ABI;
}

/* destination: float32 [count]. gradient: [count] of `dtype`, elsewhere. first: stored, else added. squares: takes the
   sum of squares of what was stored, finite exactly if every element is; NULL: not taken. Returns -1, having touched
   nothing, for a dtype that it does not know. */
EXPORTED int trainfix_native_add(void *destination, const void *gradient, size_t count, int dtype, int first,
                                 double *squares)
{
    return add(destination, gradient, count, dtype, first, squares);
}

/* Python only finds and unloads the file: the functions above are called through ctypes. */
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_loop", NULL, 0, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__loop(void)
{
    return PyModuleDef_Init(&definition);
}
