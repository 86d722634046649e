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

/* Products of factors: MADE elements are formed at a time, TILE columns and TERMS terms of their sums
 * together. Of rank 64, in float, they took 2.0 ns an element; with tiles of 128 × 16, 256 × 32 and
 * 512 × 16 it was 2.3, 2.2 and 2.4, with tiles that were not copied 3.3. */
#define MADE (1 << 16)
#define TILE 256
#define TERMS 16

#define MOST_SIGNS 32 /* registers of SIGNS; gathering.py asks for fewer */
#define STRIDE 32     /* CHUNK / STRIDE is less than 256 */

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
    LOAD_SUB_MUL_ADD, /* dst = b + (input k - a) * x                */
    MIN_S,        /* dst = a > x ? x : a                            */
    DROP,         /* dst = |a| > (index < k ? y : x) ? 0 : a        */
    ZERO_UP_TO_S, /* dst = b <= x ? 0 : a                           */
    ZERO_FROM_S,  /* dst = b >= x ? 0 : a                           */
    ZERO_FROM,    /* dst = b >= c ? 0 : a                           */
    DRAW,         /* dst = random numbers in [0, 1), key k          */
    EXP,          /* dst = e^a                            (double)  */
    LOG,          /* dst = ln a                           (double)  */
    /* k is the length of a row */
    SCALE_ROWS,   /* dst = a * table c [row of the tensor]          */
    SCALE_COLUMNS,/* dst = a * table c [column]                     */
    DOT_COLUMNS,  /* list dst [column] += a * b                     */
    DOT_ROWS,     /* list dst [row of the block] = sum of a * b     */
    SUM_ROWS,     /* list dst [row of the block] = sum of a         */
    MAX_ROWS,     /* list dst [row of the block] = largest a        */
    SUB_ROWS,     /* dst = a - list c [row of the block]            */
    DIV_ROWS,     /* dst = a / list c [row of the block]            */
    LOAD_STORED,  /* dst = memory b                                 */
    LOAD_PRODUCT, /* dst = table c @ table b, of the working type;  */
                  /* d rows of b; memory a holds some chunks of it  */
    LARGEST,      /* lanes k: largest |a|                           */
    SIGNS,        /* of b registers from a on, for each pair, each  */
                  /* with itself included, lanes k, k + 1, …:       */
                  /* elements of one sign, not 0; then, of the      */
                  /* first c, where one is not 0; where both signs  */
    /* whole blocks: what follows sees what all of the block has left */
    WAIT,
    RANK_ROWS     /* memory b: rank of each |element| in its row    */
};

struct instruction {
    int32_t operation, dst, a, b;
    double x, y;
    int64_t k;
    int32_t c, d;
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
    double *const *lists;      /* of rows of the block, or columns */
    const void *const *tables; /* double, of rows or columns of the tensor; factors of LOAD_PRODUCT */
    void *spare;               /* 24 bytes for each element of a row that is ranked */
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

/* e^x and ln x: sums and products in a fixed order, the same as in graph/vector.py, where the terms
 * are explained. */
INLINE double double_of(int64_t bits)
{
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE int64_t bits_of_double(double value)
{
    int64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE double exponential(double x)
{
    x = x < -708.0 ? -708.0 : x;
    /* adding and taking away 1.5 * 2^52 rounds to the nearest whole number, ties to even */
    const double shifted = x * 1.4426950408889634 + 0x1.8p52;
    const double power = shifted - 0x1.8p52;
    const double r = (x - power * 0.6931471803691238) - power * 1.9082149292705877e-10;
    /* 1/13! … 1/0!, written out: compilers do not see through a loop here */
    double sum = 1.6059043836821613e-10;
    sum = sum * r + 2.08767569878681e-09;
    sum = sum * r + 2.505210838544172e-08;
    sum = sum * r + 2.755731922398589e-07;
    sum = sum * r + 2.7557319223985893e-06;
    sum = sum * r + 2.48015873015873e-05;
    sum = sum * r + 0.0001984126984126984;
    sum = sum * r + 0.001388888888888889;
    sum = sum * r + 0.008333333333333333;
    sum = sum * r + 0.041666666666666664;
    sum = sum * r + 0.16666666666666666;
    sum = sum * r + 0.5;
    sum = sum * r + 1.0;
    sum = sum * r + 1.0;
    /* the low bits of `shifted` are the power */
    const int64_t scale = (int64_t)(((uint64_t)bits_of_double(shifted) + 1023) << 52);
    return sum * (x == x && x <= 710.0 ? double_of(scale) : x);
}

INLINE double logarithm(double x)
{
    const uint64_t bits = (uint64_t)bits_of_double(x);
    /* the exponent plus 1024, by unsigned arithmetic and without a conversion from 64-bit integers:
     * there are vector instructions for neither of these in AVX2 */
    const uint64_t raised = (bits - 0x3FE6A09E667F3BCDu + ((uint64_t)1024 << 52)) >> 52;
    const double e = double_of((int64_t)(raised | 0x4330000000000000u)) - (0x1p52 + 1024);
    const double m = double_of((int64_t)(bits - (raised << 52) + ((uint64_t)1024 << 52)));
    const double s = (m - 1.0) / (m + 1.0);
    const double square = s * s;
    /* 2/21, 2/19 … 2 */
    double sum = 0.09523809523809523;
    sum = sum * square + 0.10526315789473684;
    sum = sum * square + 0.11764705882352941;
    sum = sum * square + 0.13333333333333333;
    sum = sum * square + 0.15384615384615385;
    sum = sum * square + 0.18181818181818182;
    sum = sum * square + 0.2222222222222222;
    sum = sum * square + 0.2857142857142857;
    sum = sum * square + 0.4;
    sum = sum * square + 0.6666666666666666;
    sum = sum * square + 2.0;
    const double result = (sum * s + e * 1.9082149292705877e-10) + e * 0.6931471803691238;
    return x - x == 0 ? result : x;
}

/* Philox4x32-10 (Salmon et al. 2011): the words of GROUP counters, one after the other. */
#define GROUP 16

INLINE void draw_words(uint64_t key, uint64_t counter, uint32_t *words)
{
    uint32_t first[GROUP], second[GROUP], third[GROUP], fourth[GROUP];
    uint32_t key_low = (uint32_t)key, key_high = (uint32_t)(key >> 32);
    for (int j = 0; j < GROUP; j++) {
        first[j] = (uint32_t)(counter + (uint64_t)j);
        second[j] = (uint32_t)((counter + (uint64_t)j) >> 32);
        third[j] = fourth[j] = 0;
    }
    for (int round = 0; round < 10; round++) {
        for (int j = 0; j < GROUP; j++) {
            const uint64_t one = 0xD2511F53u * (uint64_t)first[j];
            const uint64_t other = 0xCD9E8D57u * (uint64_t)third[j];
            first[j] = (uint32_t)(other >> 32) ^ second[j] ^ key_low;
            second[j] = (uint32_t)other;
            third[j] = (uint32_t)(one >> 32) ^ fourth[j] ^ key_high;
            fourth[j] = (uint32_t)one;
        }
        key_low += 0x9E3779B9u;
        key_high += 0xBB67AE85u;
    }
    for (int j = 0; j < GROUP; j++) {
        words[4 * j] = first[j];
        words[4 * j + 1] = second[j];
        words[4 * j + 2] = third[j];
        words[4 * j + 3] = fourth[j];
    }
}

/* Ranks of the magnitudes of a row, equal ones in ascending order, nan last: a radix sort of 11 bits
 * at a time that never moves the elements themselves, only their keys and places. */
#define DIGIT 11
#define BUCKETS (1 << DIGIT)
#define FEW 48 /* rows this short are sorted by insertion */

#define REAL float
#define BITS uint32_t
#define RANK_ROW rank_row_float
#define DIGITS 3
#include "ranks.h"
#define REAL double
#define BITS uint64_t
#define RANK_ROW rank_row_double
#define DIGITS 6
#include "ranks.h"

static void rank_rows(const struct call *call, const struct instruction *now)
{
    for (int64_t first = 0; first < call->count; first += now->k) {
        if (call->is_wide)
            rank_row_double((double *)call->stores[now->b] + first, now->k, call->spare);
        else
            rank_row_float((float *)call->stores[now->b] + first, now->k, call->spare);
    }
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
#define PRODUCT product_float
#define ADD_TERMS add_terms_float
#define COUNT_COMMON count_common_float
#include "loops.h"
#define REAL double
#define ABSOLUTE fabs
#define RUN run_double
#define PRODUCT product_double
#define ADD_TERMS add_terms_double
#define COUNT_COMMON count_common_double
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
#define PRODUCT product_float_avx2
#define ADD_TERMS add_terms_float_avx2
#define COUNT_COMMON count_common_float_avx2
#include "loops.h"
#define REAL double
#define ABSOLUTE fabs
#define RUN run_double_avx2
#define PRODUCT product_double_avx2
#define ADD_TERMS add_terms_double_avx2
#define COUNT_COMMON count_common_double_avx2
#define TO_ODD to_odd_float
#include "loops.h"
#endif

#include "checksum.h"

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

/* Whether some of the numbers has all bits of a mask set. */
#define HAS_BITS(type)                                                                             \
    for (int64_t first = 0; first < count; first += CHUNK) {                                       \
        const int64_t n = count - first < CHUNK ? count - first : CHUNK;                           \
        const type *from = (const type *)data + first;                                             \
        type found = 0;                                                                            \
        for (int64_t i = 0; i < n; i++)                                                            \
            found |= (type)((from[i] & (type)mask) == (type)mask);                                 \
        if (found)                                                                                 \
            return 1;                                                                              \
    }                                                                                              \
    return 0

int32_t lm_has_bits(const void *data, int64_t count, int64_t width, int64_t mask)
{
    switch (width) {
    case 1:
        HAS_BITS(uint8_t);
    case 2:
        HAS_BITS(uint16_t);
    case 4:
        HAS_BITS(uint32_t);
    default:
        HAS_BITS(uint64_t);
    }
}

/* Where the output of a run of blocks goes, and what is found out on the way. */
struct sink {
    int64_t begins;       /* 1: forgets what was found out before */
    int64_t descriptor;
    int64_t offset;       /* of the next block's first byte, in the file */
    int64_t mask;         /* bits that are all set in inf and nan; 0: not looked for */
    int64_t is_nonfinite; /* set to 1 if there are any */
    int64_t error;        /* errno, if writing fails */
    int64_t unwritten;    /* bytes of the block that could not be written */
    uint64_t halves[2];   /* of the checksum of more than SHORT bytes, the low one first */
    struct checksum checksum;
};

/* A run of blocks, read as they are needed, and written as they are done. One call for many blocks:
 * what the caller does for each call, it does under the interpreter's lock, which all workers
 * share. */
struct stream {
    const struct call *call;
    const int32_t *descriptors; /* one per input, -1: it lies in memory */
    const int64_t *offsets;     /* of each input's first element, in its file or memory */
    const int32_t *item_bytes;  /* one per input */
    void *const *room;          /* a block of each input, or where its memory begins */
    struct sink *sink;          /* NULL: outputs stay where they are, one block after the other */
    int64_t input_count;
    int64_t start;              /* index of the first element in its tensor */
    int64_t count;              /* elements in all */
    int64_t block;              /* elements per block */
    int64_t lane_count;         /* of each block; so for counters */
    int64_t counter_count;
    int64_t output_item_bytes;
    const struct call *after;   /* run on every block when it is done, its output as the last input;
                                 * NULL: nothing */
    int64_t after_lane_count;
};

/* Whether all bytes of a block of an input are there; `size` bytes from `offset` of the file. */
static int read_block(int descriptor, char *room, int64_t size, int64_t offset)
{
    int64_t filled = 0;
    while (filled < size) {
        const ssize_t got = pread(descriptor, room + filled, (size_t)(size - filled), offset + filled);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return 0;
        filled += got;
    }
    return 1;
}

/* Whether a block could be written: looked at, added to the checksum and written while the cache
 * holds it. */
static int write_block(struct sink *sink, const char *data, int64_t count, int64_t item_bytes)
{
    const int64_t size = count * item_bytes;
    if (sink->mask && !sink->is_nonfinite)
        sink->is_nonfinite = lm_has_bits(data, count, item_bytes, sink->mask);
    add_to_checksum(&sink->checksum, (const uint8_t *)data, (size_t)size);
    for (int64_t done = 0; done < size;) {
        const ssize_t put =
            pwrite((int)sink->descriptor, data + done, (size_t)(size - done), sink->offset + done);
        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0) {
            sink->error = put < 0 ? errno : EIO;
            sink->unwritten = size - done;
            return 0;
        }
        done += put;
    }
    sink->offset += size;
    return 1;
}

/* Returns 0, 1 + the number of the input that could not be read, or -1: the output could not be
 * written. */
int32_t lm_stream(const struct stream *stream)
{
    struct call call = *stream->call, after;
    if (stream->after)
        after = *stream->after;
    struct sink *const sink = stream->sink;
    if (sink && sink->begins) {
        sink->begins = sink->is_nonfinite = sink->error = 0;
        begin_checksum(&sink->checksum);
    }
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
            if (!read_block(stream->descriptors[i], stream->room[i],
                            call.count * stream->item_bytes[i], offset))
                return (int32_t)(1 + i);
            call.inputs[i] = stream->room[i];
        }
        run_block(&call);
        call.lanes += stream->lane_count * LANES;
        call.counters += stream->counter_count * 3;
        if (stream->after) {
            for (int64_t i = 0; i < stream->input_count; i++)
                after.inputs[i] = call.inputs[i];
            after.inputs[stream->input_count] = call.output;
            after.start = call.start;
            after.count = call.count;
            run_block(&after);
            after.lanes += stream->after_lane_count * LANES;
        }
        if (sink) {
            if (!write_block(sink, call.output, call.count, stream->output_item_bytes))
                return -1;
        } else if (call.output) {
            call.output = (char *)call.output + call.count * stream->output_item_bytes;
        }
    }
    if (sink && sink->checksum.length > SHORT)
        finish_checksum(&sink->checksum, sink->halves);
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
    return 8; /* of this interface; library.py refuses another */
}
