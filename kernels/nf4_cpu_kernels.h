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

/* Where step s of output n lies, or a copy filled up with zeros, and the scale of each place. */
static inline TARGET ALWAYS Vec ISA(find)(
    const Multiply *job, int64_t n, int64_t s, const uint8_t **codes, uint8_t *padded) {
    const float *absmax = job->absmax + n * (job->columns >> job->log);
    const int64_t first = s * STEP, rest = job->columns - first;
    *codes = job->codes + (n * job->columns + first) / 2;
    if (rest < STEP) {
        float scales[W] = {0};
        memset(padded, 0, STEP / 2);
        memcpy(padded, *codes, (size_t)rest / 2);
        *codes = padded;
        for (int64_t i = 0; i < rest; i += 8) scales[i / 8] = absmax[(first + i) >> job->log];
        return load(scales);
    }
    __builtin_prefetch(*codes + 1024);
    absmax += first >> job->log;
    return job->block < STEP ? few_scales(absmax, (int)job->block / 8) : set1(*absmax);
}

/* One output of a few rows, their sums in registers; the scale is applied to a step's sum. */
static inline TARGET ALWAYS void ISA(few_rows)(
    const Multiply *job, Planes planes, int64_t n, int rows) {
    const float *x = job->arranged;
    Vec sums[4];
    for (int r = 0; r < rows; r++) sums[r] = set1(0);
    for (int64_t s = 0; s * STEP < job->columns; s++) {
        const uint8_t *codes;
        uint8_t padded[STEP / 2];
        const Vec scale = ISA(find)(job, n, s, &codes, padded);
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
    for (int r = 0; r < rows; r++) job->y[r * job->outputs + n] = total(sums[r]);
}

/* Adds to the sums of one to three rows their products with a panel of weights. */
static inline TARGET ALWAYS void ISA(add_panel)(
    const Vec *w, int steps, const float *x, int64_t stride, int rows, Vec *sums) {
    Vec local[3 * PANEL];
    for (int i = 0; i < rows * PANEL; i++) local[i] = sums[i];
    for (int s = 0; s < steps; s++, x += stride)
        for (int k = 0; k < 8; k++, w += PANEL) {
            Vec value[3];
            for (int r = 0; r < rows; r++) value[r] = load(x + r * STEP + k * W);
            for (int p = 0; p < PANEL; p++)
                for (int r = 0; r < rows; r++)
                    local[r * PANEL + p] = muladd(w[p], value[r], local[r * PANEL + p]);
        }
    for (int i = 0; i < rows * PANEL; i++) sums[i] = local[i];
}

/* PANEL outputs of many rows, over steps from to end; the weights are scaled before the sums. */
static TARGET void ISA(many_rows)(
    const Multiply *job, Planes planes, int64_t n, int64_t high, int64_t from, int64_t end) {
    const int rows = (int)job->rows;
    Vec sums[MAX_ROWS * PANEL], w[DEPTH * 8 * PANEL];
    for (int i = 0; i < rows * PANEL; i++) sums[i] = set1(0);
    for (int64_t s = from; s < end; s += DEPTH) {
        const int steps = (int)least(DEPTH, end - s);
        for (int p = 0; p < PANEL; p++)
            for (int i = 0; i < steps; i++) {
                const uint8_t *codes;
                uint8_t padded[STEP / 2];
                const Vec scale = ISA(find)(job, least(n + p, high - 1), s + i, &codes, padded);
                Vec v[8];
                unpack(planes, codes, v);
                for (int k = 0; k < 8; k++) w[(i * 8 + k) * PANEL + p] = mul(v[k], scale);
            }
        const float *x = job->arranged + s * rows * STEP;
        for (int r = 0; r < rows; r += 3, x += 3 * STEP) switch (rows - r) {
                case 1: ISA(add_panel)(w, steps, x, rows * STEP, 1, sums + r * PANEL); break;
                case 2: ISA(add_panel)(w, steps, x, rows * STEP, 2, sums + r * PANEL); break;
                default: ISA(add_panel)(w, steps, x, rows * STEP, 3, sums + r * PANEL);
            }
    }
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < PANEL && n + p < high; p++) {
            float *y = &job->y[r * job->outputs + n + p];
            *y = (from ? *y : 0) + total(sums[r * PANEL + p]);
        }
}

static TARGET void ISA(multiply)(const void *data, int64_t low, int64_t high) {
    const Multiply *job = data;
    const Planes planes = new_planes(job->values);
    if (job->rows <= 4) {
        for (int64_t n = low; n < high; n++) switch (job->rows) {
                case 1: ISA(few_rows)(job, planes, n, 1); break;
                case 2: ISA(few_rows)(job, planes, n, 2); break;
                case 3: ISA(few_rows)(job, planes, n, 3); break;
                case 4: ISA(few_rows)(job, planes, n, 4); break;
            }
        return;
    }
    const int64_t steps = (job->columns + STEP - 1) / STEP;
    const int64_t span = CACHED / (job->rows * STEP * DEPTH) * DEPTH + DEPTH;
    for (int64_t s = 0; s < steps; s += span)
        for (int64_t n = low; n < high; n += PANEL)
            ISA(many_rows)(job, planes, n, high, s, least(s + span, steps));
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
