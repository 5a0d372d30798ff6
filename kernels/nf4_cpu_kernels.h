/* The algorithms, each for blocks, steps or outputs low to high of its job. Included by
   nf4_cpu_simd.h once an instruction set, whose vocabulary it uses up. */

#define STEP (8 * W)

static TARGET void ISA(quantize)(const void *data, int64_t low, int64_t high) {
    const Quantize *job = data;
    float wide[CHUNK], scaled[CHUNK];
    int32_t index[CHUNK];
    for (int64_t b = low; b < high; b++) {
        const int64_t start = b * job->block, count = least(job->block, job->count - start);
        int32_t largest = 0; /* as bits, where NaN is above infinity */
        for (int64_t i = 0; i < count; i += CHUNK) {
            const int64_t n = least(CHUNK, count - i);
            const float *values = widen(job, start + i, n, wide);
            for (int64_t j = 0; j < n; j++) {
                int32_t bits;
                memcpy(&bits, &values[j], 4);
                bits &= INT32_MAX;
                largest = bits > largest ? bits : largest;
            }
        }
        memcpy(&job->absmax[b], &largest, 4);
        const float absmax = job->absmax[b], divisor = absmax < TINIEST ? TINIEST : absmax;
        const float inverse = 1 / divisor;
        for (int64_t i = 0; i < count; i += CHUNK) {
            const int64_t n = least(CHUNK, count - i), even = n + n % 2;
            const float *values = widen(job, start + i, n, wide);
            if (count == job->block)
                for (int64_t j = 0; j < n; j++) scaled[j] = values[j] * inverse;
            else
                for (int64_t j = 0; j < n; j++) scaled[j] = values[j] / divisor;
            if (n < even) scaled[n] = 0;
            for (int64_t j = 0; j < even; j++) {
                int32_t above = 15; /* of the thresholds; NaN is above all */
                for (int t = 0; t < 15; t++) above -= scaled[j] <= job->thresholds[t];
                index[j] = above;
            }
            uint8_t *codes = job->codes + (start + i) / 2;
            for (int64_t j = 0; j < even / 2; j++)
                codes[j] = (uint8_t)(index[2 * j] << 4 | index[2 * j + 1]);
            if (job->order)
                for (int64_t j = 0; j < even / 2; j++) codes[j] = job->order[codes[j]];
        }
    }
}

static TARGET void ISA(decode)(const void *data, int64_t low, int64_t high) {
    const Decode *job = data;
    const Table table = new_table(job->values);
    const int64_t end = job->start + job->count;
    for (int64_t b = low; b < high; b++) {
        const int64_t from = b == 0 ? job->start : b * job->block;
        const int64_t count = least((b + 1) * job->block, end) - from;
        const uint8_t *codes = job->codes + from / 2;
        float *out = job->out + (from - job->start);
        const float absmax = job->absmax[b];
        const Vec scale = set1(absmax);
        int64_t i = 0;
        for (; i + W <= count; i += W)
            store(out + i, mul(lookup(table, spread(codes + i / 2)), scale));
        for (; i < count; i++)
            out[i] = job->values[i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4] * absmax;
    }
}

/* Puts the elements of x where `unpack` puts their weights, filling the last step with zeros. */
static TARGET void ISA(arrange)(const void *data, int64_t low, int64_t high) {
    const Multiply *job = data;
    float *out = job->arranged + low * job->rows * STEP;
    for (int64_t s = low; s < high; s++)
        for (int64_t r = 0; r < job->rows; r++, out += STEP) {
            const float *x = job->x + r * job->columns + s * STEP;
            const int64_t rest = job->columns - s * STEP;
            for (int k = 0; k < 8; k++)
                for (int i = 0; i < W; i++)
                    out[k * W + i] = POSITION(k, i) < rest ? x[POSITION(k, i)] : 0;
        }
}

/* Adds a step's products to the sums of all rows. */
static inline TARGET ALWAYS void ISA(add_step)(
    Planes planes, const uint8_t *codes, Vec scale, const float *x, int rows, Vec *sums) {
    Vec w[8];
    unpack(planes, codes, w);
    for (int r = 0; r < rows; r++, x += STEP) {
        Vec even = mul(w[0], load(x)), odd = mul(w[1], load(x + W));
        for (int k = 2; k < 8; k += 2) {
            even = muladd(w[k], load(x + k * W), even);
            odd = muladd(w[k + 1], load(x + (k + 1) * W), odd);
        }
        sums[r] = muladd(add(even, odd), scale, sums[r]);
    }
}

static inline TARGET ALWAYS void ISA(output)(const Multiply *job, Planes planes, int64_t n, int rows) {
    const int places = (int)(job->block / 8); /* a block */
    const int64_t steps = job->columns / STEP, rest = job->columns % STEP;
    const uint8_t *codes = job->codes + n * (job->columns / 2);
    const float *absmax = job->absmax + n * (job->columns / job->block), *x = job->arranged;
    Vec sums[MAX_ROWS];
    for (int r = 0; r < rows; r++) sums[r] = set1(0);
    for (int64_t s = 0; s < steps; s++, codes += STEP / 2, x += rows * STEP) {
        __builtin_prefetch(codes + 1024);
        const Vec scale = places < W ? few_scales(absmax + s * (W / places), places)
                                     : set1(absmax[s >> job->shift]);
        ISA(add_step)(planes, codes, scale, x, rows, sums);
    }
    if (rest) {
        uint8_t padded[STEP / 2] = {0};
        float scales[W] = {0};
        memcpy(padded, codes, (size_t)rest / 2);
        for (int64_t i = 0; i < rest / 8; i++) scales[i] = absmax[(steps * W + i) / places];
        ISA(add_step)(planes, padded, load(scales), x, rows, sums);
    }
    for (int r = 0; r < rows; r++) job->y[r * job->outputs + n] = total(sums[r]);
}

static TARGET void ISA(multiply)(const void *data, int64_t low, int64_t high) {
    const Multiply *job = data;
    const Planes planes = new_planes(job->values);
    for (int64_t n = low; n < high; n++) switch (job->rows) { /* a few sums stay in registers */
            case 1: ISA(output)(job, planes, n, 1); break;
            case 2: ISA(output)(job, planes, n, 2); break;
            case 3: ISA(output)(job, planes, n, 3); break;
            case 4: ISA(output)(job, planes, n, 4); break;
            default: ISA(output)(job, planes, n, (int)job->rows);
        }
}

#undef STEP
#undef ISA
#undef TARGET
#undef W
#undef Vec
#undef Table
#undef new_table
#undef lookup
#undef spread
#undef Planes
#undef new_planes
#undef unpack
#undef POSITION
#undef load_words
#undef drop
#undef set1
#undef load
#undef store
#undef add
#undef mul
#undef muladd
#undef few_scales
#undef total
