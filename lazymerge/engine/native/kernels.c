/* Block programs: what `program.py` has recorded of an operation, run in the first-level cache.
 *
 * A block of 2^18 elements is walked in chunks that fit the cache together with all registers of
 * the program; every instruction is one loop over a chunk. Each element therefore comes from memory
 * once and goes back once, however many operations a merge method consists of.
 *
 * The arithmetic is IEEE 754 in the working type, operation by operation: no contraction to fused
 * multiply-add, no reassociation, no flushing (see setup.py for the flags). The same program run by
 * torch, one call per instruction, gives the same bits; only the payload of a nan may differ.
 *
 * No Python, no allocation, no threads: everything is passed in by the caller, who also opens the
 * files. The numbers of the operations and dtypes are those of program.py.
 */
#define _FILE_OFFSET_BITS 64
#include <errno.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

#define CHUNK 1024 /* elements; program.py sizes the registers by lm_chunk() */
#define LANES 16   /* running sums of a reduction; vector.py defines their order */

enum dtype { F64, F32, F16, BF16, F8_E4M3, F8_E5M2 };

enum operation {
    LOAD,      /* dst = input k                                     */
    COPY,      /* dst = a                                           */
    ADD,       /* dst = a + b                                       */
    SUB,       /* dst = a - b                                       */
    MUL,       /* dst = a * b                                       */
    DIV,       /* dst = a / b                                       */
    ADD_S,     /* dst = a + x                                       */
    MUL_S,     /* dst = a * x                                       */
    ABS,       /* dst = |a|                                         */
    MAX_S,     /* dst = a < x ? x : a                               */
    GE_S,      /* dst = a >= x ? 1 : 0                              */
    GT_S,      /* dst = a > x ? 1 : 0                               */
    EQ_S,      /* dst = a == x ? 1 : 0                              */
    KEEP,      /* dst = |a| <= (index < k ? y : x) ? 0 : a          */
    STORE,     /* memory b = a                                      */
    DOT,       /* lanes k += a * b                                  */
    SUM,       /* lanes k += a                                      */
    COUNT,     /* counters k: a > y, x <= a <= y; the latter to b   */
    FIND,      /* counters k: equal to x so far; index of the b-th  */
    /* several of the above in one trip, each rounded as if it stood alone */
    LOAD_SUB,        /* dst = input k - a                           */
    LOAD_MUL,        /* dst = input k * x                           */
    MUL_ADD,         /* dst = b + a * x                             */
    LOAD_MUL_ADD,    /* dst = b + (input k) * x                     */
    LOAD_SUB_MUL_ADD /* dst = b + (input k - a) * x                 */
};

struct instruction {
    int32_t operation, dst, a, b;
    double x, y;
    int64_t k;
};

struct call {
    const struct instruction *program;
    const void **inputs;       /* first element of the block, one pointer per input */
    const int32_t *dtypes;     /* one per input */
    const float *const *f8;    /* values of the 256 codes: F8_E4M3, F8_E5M2 */
    void *registers;           /* CHUNK elements of the working type each */
    void *const *stores;       /* memory of STORE and COUNT, working type */
    double *lanes;             /* LANES each */
    int64_t *counters;         /* 3 each */
    void *output;              /* NULL: none */
    int64_t length;            /* instructions */
    int64_t start;             /* index of the block's first element in its tensor */
    int64_t count;             /* elements of the block */
    int32_t is_wide;           /* working type: 1 double, 0 float */
    int32_t result;            /* register that is written to `output` */
    int32_t output_dtype;
    int32_t rounds_once;       /* double to 16 bits without rounding to float on the way */
};

#define PORTABLE_LOOP _Pragma("GCC ivdep") /* registers are equal or apart, never shifted */

#define INLINE static inline __attribute__((always_inline))

INLINE float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float from_bf16(uint16_t code)
{
    return float_of((uint32_t)code << 16);
}

INLINE float from_f16(uint16_t code)
{
    uint32_t magnitude = (uint32_t)(code & 0x7FFF) << 13;
    uint32_t sign = (uint32_t)(code & 0x8000) << 16;
    /* the exponent's bias differs by 112; multiplying by 2^112 is exact, subnormals included */
    uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
    uint32_t special = magnitude | 0x7F800000; /* inf and nan keep their mantissa */
    return float_of(((code & 0x7C00) == 0x7C00 ? special : finite) | sign);
}

INLINE uint16_t to_bf16(float value)
{
    uint32_t bits = bits_of(value);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : (uint16_t)rounded;
}

INLINE uint16_t to_f16(float value)
{
    uint32_t bits = bits_of(value);
    uint32_t sign = (bits >> 16) & 0x8000;
    uint32_t magnitude = bits & 0x7FFFFFFF;
    /* normal: rebias, round to nearest even in the 13 bits that go */
    uint32_t normal = (magnitude - (112u << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
    /* below 2^-14: adding 1/2 aligns the last bit kept, 2^-24, with float's last bit */
    uint32_t small = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    uint32_t code = magnitude < 0x38800000 ? small : normal;
    code = magnitude >= 0x477FF000 ? 0x7C00 : code; /* 65520 and more are infinite */
    code = magnitude > 0x7F800000 ? 0x7E00 : code;
    return (uint16_t)(code | sign);
}

/* To float, inexact results with the last bit set: no later rounding to fewer bits can then meet
 * a middle that the double was not on (rounding to odd, Boldo and Melquiond 2008). */
INLINE float to_odd_float(double value)
{
    float nearest = (float)value;
    double back = nearest;
    uint32_t inexact = back != value;
    uint32_t grown = fabs(back) > fabs(value);
    return float_of((bits_of(nearest) - grown) | inexact);
}

/* Every loop is compiled for any processor, and on x86 once more for those with AVX2 and F16C
 * (2013 and later), which convert halves themselves. */
static void halves_to_floats(const uint16_t *from, float *to, ptrdiff_t n)
{
    PORTABLE_LOOP
    for (ptrdiff_t i = 0; i < n; i++)
        to[i] = from_f16(from[i]);
}

static void floats_to_halves(const float *from, uint16_t *to, ptrdiff_t n)
{
    PORTABLE_LOOP
    for (ptrdiff_t i = 0; i < n; i++)
        to[i] = to_f16(from[i]);
}

#define TARGET
#define HALVES_TO_FLOATS halves_to_floats
#define FLOATS_TO_HALVES floats_to_halves
#define REAL float
#define TO_ODD(value) (value)
#define ABSOLUTE fabsf
#define RUN run_float
#include "loops.h"
#define REAL double
#define ABSOLUTE fabs
#define RUN run_double
#define TO_ODD to_odd_float
#include "loops.h"
#undef TARGET
#undef HALVES_TO_FLOATS
#undef FLOATS_TO_HALVES

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_AVX2
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,f16c")))

TARGET static void halves_to_floats_avx2(const uint16_t *from, float *to, ptrdiff_t n)
{
    ptrdiff_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
    for (; i < n; i++)
        to[i] = _cvtsh_ss(from[i]);
}

TARGET static void floats_to_halves_avx2(const float *from, uint16_t *to, ptrdiff_t n)
{
    ptrdiff_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(to + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
    for (; i < n; i++)
        to[i] = _cvtss_sh(from[i], _MM_FROUND_TO_NEAREST_INT);
}

#define HALVES_TO_FLOATS halves_to_floats_avx2
#define FLOATS_TO_HALVES floats_to_halves_avx2
#define REAL float
#define TO_ODD(value) (value)
#define ABSOLUTE fabsf
#define RUN run_float_avx2
#include "loops.h"
#define REAL double
#define ABSOLUTE fabs
#define RUN run_double_avx2
#define TO_ODD to_odd_float
#include "loops.h"
#endif

static void run_block(const struct call *call)
{
#ifdef HAS_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) {
        if (call->is_wide)
            run_double_avx2(call);
        else
            run_float_avx2(call);
        return;
    }
#endif
    if (call->is_wide)
        run_double(call);
    else
        run_float(call);
}

/* A run of blocks, read as they are needed. One call for many blocks: what the caller does for each
 * call, it does under the interpreter's lock, which all workers share. */
struct stream {
    const struct call *call;
    const int32_t *descriptors; /* one per input, -1: it lies in memory */
    const int64_t *offsets;     /* of each input's first element, in its file or memory */
    const int32_t *item_bytes;  /* one per input */
    void *const *room;          /* a block of each input, or where its memory begins */
    int64_t input_count;
    int64_t start;              /* index of the first element in its tensor */
    int64_t count;              /* elements in all */
    int64_t block;              /* elements per block */
    int64_t lane_count;         /* of each block; so for counters */
    int64_t counter_count;
    int64_t output_item_bytes;
};

/* Returns 0, or 1 + the number of the input that could not be read. */
int32_t lm_stream(const struct stream *stream)
{
    struct call call = *stream->call;
    for (int64_t done = 0; done < stream->count; done += stream->block) {
        const int64_t left = stream->count - done;
        call.start = stream->start + done;
        call.count = left < stream->block ? left : stream->block;
        for (int64_t i = 0; i < stream->input_count; i++) {
            const int64_t offset = stream->offsets[i] + done * stream->item_bytes[i];
            if (stream->descriptors[i] < 0) {
                call.inputs[i] = (const char *)stream->room[i] + offset;
                continue;
            }
            int64_t filled = 0;
            const int64_t size = call.count * stream->item_bytes[i];
            while (filled < size) {
                const ssize_t got = pread(stream->descriptors[i], (char *)stream->room[i] + filled,
                                          size - filled, offset + filled);
                if (got < 0 && errno == EINTR)
                    continue;
                if (got <= 0)
                    return (int32_t)(1 + i);
                filled += got;
            }
            call.inputs[i] = stream->room[i];
        }
        run_block(&call);
        call.lanes += stream->lane_count * LANES;
        call.counters += stream->counter_count * 3;
        if (call.output)
            call.output = (char *)call.output + call.count * stream->output_item_bytes;
    }
    return 0;
}

/* Runs a program over one block that is in memory. */
void lm_run(const struct call *call)
{
    run_block(call);
}

int32_t lm_chunk(void)
{
    return CHUNK;
}

int32_t lm_version(void)
{
    return 2; /* of this interface; library.py refuses another */
}
