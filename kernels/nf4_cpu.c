/* The kernels behind nf4_native.py. They equal nf4.py to the bit, but for the sums of `multiply`.
   Each is written once, in nf4_cpu_kernels.h, for a part of its job; `run` shares the parts out. */

#include <stdint.h>
#include <string.h>

#define ALWAYS __attribute__((always_inline))
#define CHUNK 64     /* elements that are quantized together */
#define MAX_ROWS 64  /* of x that are multiplied together */
#define CACHED 65536 /* floats of x that stay in a core's second cache */
#define PANEL 4      /* outputs that share a load of x */
#define DEPTH 8      /* steps of a panel that stay in the first cache */
#define FEW 32768    /* elements for which one thread is enough */
#define TINIEST 1e-38f

typedef void Part(const void *job, int64_t low, int64_t high);

typedef struct {
    const void *weight;
    const float *thresholds;
    const uint8_t *order; /* pairs of indices to pairs of codes; null where they are the same */
    uint8_t *codes;
    float *absmax;
    int64_t count, block;
    int type;
} Quantize;

typedef struct {
    const uint8_t *codes;
    const float *absmax, *values;
    float *out;
    int64_t start, count, block;
} Decode;

typedef struct {
    const float *x, *absmax, *values;
    const uint8_t *codes;
    float *arranged, *y;
    int64_t rows, columns, outputs, block;
    int log; /* of the block, to base 2 */
} Multiply;

typedef struct {
    const uint8_t *codes;
    const float *map, *absmax, *offset;
    float *out;
} Unnest;

typedef struct {
    const char *name;
    int step; /* weights that its `multiply` takes at once */
    Part *quantize, *decode, *arrange, *multiply;
} Isa;

enum { FP32, FP16, BF16 };

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* A few of the elements in fp32: where they are, or in `wide`. */
static inline ALWAYS const float *widen(const Quantize *job, int64_t start, int64_t n, float *wide) {
    if (job->type == FP32) return (const float *)job->weight + start;
    const uint16_t *narrow = (const uint16_t *)job->weight + start;
    if (job->type == BF16)
        for (int64_t i = 0; i < n; i++) {
            const uint32_t bits = (uint32_t)narrow[i] << 16;
            memcpy(&wide[i], &bits, 4);
        }
    else
        for (int64_t i = 0; i < n; i++) {
            const uint32_t half = narrow[i], special = (half & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
            uint32_t bits = (half & 0x7fff) << 13;
            float value;
            memcpy(&value, &bits, 4);
            value *= 0x1p112f; /* the exponents' difference; subnormals come out normal */
            memcpy(&bits, &value, 4);
            bits |= special | (half & 0x8000) << 16;
            memcpy(&wide[i], &bits, 4);
        }
    return wide;
}

#include "nf4_cpu_simd.h"

#define ENTRY(name) quantize_##name, decode_##name, arrange_##name, multiply_##name
static const Isa isas[] = {
#if defined __x86_64__
    {"avx512", 128, ENTRY(avx512)},
    {"avx2", 64, ENTRY(avx2)},
#elif defined NEON
    {"neon", 32, ENTRY(neon)},
#endif
    {"scalar", 32, ENTRY(scalar)},
};
static const Isa *isa;

static int supported(const char *name) {
#if defined __x86_64__
    __builtin_cpu_init();
    if (!strcmp(name, "avx512"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!strcmp(name, "avx2"))
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    (void)name;
    return 1;
}

/* Takes the best instruction set, or the named one; null where the machine has not got it. */
const char *nf4_use(const char *name) {
    for (size_t i = 0; i < sizeof isas / sizeof *isas; i++)
        if (supported(isas[i].name) && (!name || !strcmp(name, isas[i].name)))
            return (isa = &isas[i])->name;
    return 0;
}

typedef struct {
    Part *part;
    const void *job;
    int64_t count;
} Split;

static void (*fork_team)(void (*)(void *), void *, unsigned, unsigned);
static int (*thread_number)(void), (*team_size)(void);

/* OpenMP is called by address, so as to share torch's copy: two would spin against each other. */
void nf4_openmp(void *parallel, void *number, void *size) {
    fork_team = (void (*)(void (*)(void *), void *, unsigned, unsigned))parallel;
    thread_number = (int (*)(void))number;
    team_size = (int (*)(void))size;
}

static void share(void *data) {
    const Split *split = data;
    const int64_t i = thread_number(), n = team_size();
    split->part(split->job, split->count * i / n, split->count * (i + 1) / n);
}

static void run(Part *part, const void *job, int64_t count, int64_t elements, int threads) {
    Split split = {part, job, count};
    if (threads > 1 && elements > FEW && fork_team)
        fork_team(share, &split, threads, 0);
    else
        part(job, 0, count);
}

void nf4_quantize(
    const void *weight, int type, int64_t count, int64_t block, const float *thresholds,
    const uint8_t *order, uint8_t *codes, float *absmax, int threads) {
    const Quantize job = {weight, thresholds, order, codes, absmax, count, block, type};
    run(isa->quantize, &job, (count + block - 1) / block, count, threads);
}

void nf4_decode(
    const uint8_t *codes, const float *absmax, const float *values, float *out, int64_t start,
    int64_t count, int64_t block, int threads) {
    const int64_t first = start / block, last = (start + count + block - 1) / block;
    const Decode job = {
        codes + first * block / 2, absmax + first, values, out, start - first * block, count, block};
    run(isa->decode, &job, last - first, count, threads);
}

/* `arranged` has room for 64 rows, or fewer, of floats, the columns rounded up to 128. */
void nf4_multiply(
    const float *x, const uint8_t *codes, const float *absmax, const float *values, float *arranged,
    float *y, int64_t rows, int64_t columns, int64_t outputs, int64_t block, int threads) {
    const int64_t steps = (columns + isa->step - 1) / isa->step;
    int log = 0;
    while (1 << log < block) log++;
    for (int64_t r = 0; r < rows; r += MAX_ROWS) {
        const Multiply job = {
            x + r * columns, absmax, values, codes, arranged, y + r * outputs,
            least(rows - r, MAX_ROWS), columns, outputs, block, log};
        run(isa->arrange, &job, steps, job.rows * columns, threads);
        run(isa->multiply, &job, outputs, outputs * columns, threads);
    }
}

static void unnest(const void *data, int64_t low, int64_t high) {
    const Unnest *job = data;
    for (int64_t i = low; i < high; i++) {
        const float scaled = job->map[job->codes[i]] * job->absmax[i / 256];
        job->out[i] = scaled + *job->offset;
    }
}

void nf4_unnest(
    const uint8_t *codes, const float *map, const float *absmax, const float *offset, float *out,
    int64_t count, int threads) {
    const Unnest job = {codes, map, absmax, offset, out};
    run(unnest, &job, count, count, threads);
}
