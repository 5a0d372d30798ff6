/* What the algorithms are written in, for each instruction set: vectors of W floats and of W words.

   new_table, lookup     16 values, and those that the low four bits of each word name
   spread                the codes of W/2 bytes, each at the bottom of a word
   new_planes, unpack    16 values, and those of the 8·W codes of 4·W bytes, in 8 vectors
   POSITION(k, i)        which of those codes is in vector k, place i
   few_scales            absmax of consecutive blocks, each repeated over so many places

   A block's codes are in neighbouring places of all 8 vectors, 8 codes a place. */

/* Where nothing better is defined, place i of vector k holds nibble k of word i. */
#define WORD_POSITION(k, i) (8 * (i) + ((k) ^ 1))
#define UNPACK_WORDS(table, codes, w) \
    for (int k = 0; k < 8; k++) (w)[k] = lookup(table, drop(load_words(codes), 4 * k))

typedef float Float4 __attribute__((vector_size(16)));
typedef uint32_t Word4 __attribute__((vector_size(16)));
typedef struct {
    float at[16];
} Table_scalar;

static inline Table_scalar table_scalar(const float *values) {
    Table_scalar table;
    memcpy(table.at, values, sizeof table.at);
    return table;
}
static inline Float4 load_scalar(const float *from) {
    Float4 v;
    memcpy(&v, from, sizeof v);
    return v;
}
static inline void store_scalar(float *to, Float4 v) { memcpy(to, &v, sizeof v); }
static inline Word4 words_scalar(const uint8_t *p) {
    Word4 words;
    for (int i = 0; i < 4; i++, p += 4)
        words[i] = p[0] | p[1] << 8 | p[2] << 16 | (uint32_t)p[3] << 24;
    return words;
}
static inline Float4 lookup_scalar(Table_scalar table, Word4 codes) {
    Float4 v;
    for (int i = 0; i < 4; i++) v[i] = table.at[codes[i] & 15];
    return v;
}
#define ISA(name) name##_scalar
#define TARGET
#define W 4
#define Vec Float4
#define Table Table_scalar
#define new_table table_scalar
#define lookup lookup_scalar
#define spread(p) ((Word4){(p)[0] >> 4, (p)[0], (p)[1] >> 4, (p)[1]})
#define Planes Table_scalar
#define new_planes table_scalar
#define unpack UNPACK_WORDS
#define POSITION WORD_POSITION
#define load_words words_scalar
#define drop(words, bits) ((words) >> (bits))
#define set1(a) ((Float4){a, a, a, a})
#define load load_scalar
#define store store_scalar
#define add(a, b) ((a) + (b))
#define mul(a, b) ((a) * (b))
#define muladd(a, b, c) ((a) * (b) + (c))
#define few_scales(absmax, places) set1(*(absmax)) /* a block fills a vector */
#define total(v) ((v)[0] + (v)[1] + (v)[2] + (v)[3])
#include "nf4_cpu_kernels.h"

#if defined __x86_64__
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma")))
typedef struct {
    __m256 low, high;
} Table_avx2;
typedef struct {
    __m256i plane[4]; /* byte j of each value */
} Planes_avx2;

static inline TARGET Table_avx2 table_avx2(const float *values) {
    return (Table_avx2){_mm256_loadu_ps(values), _mm256_loadu_ps(values + 8)};
}
static inline TARGET __m256 lookup_avx2(Table_avx2 table, __m256i codes) {
    const __m256 low = _mm256_permutevar8x32_ps(table.low, codes);
    const __m256 high = _mm256_permutevar8x32_ps(table.high, codes);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
}
static inline TARGET __m256i spread_avx2(const uint8_t *p) {
    int32_t word;
    memcpy(&word, p, sizeof word);
    const __m256i bits = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    return _mm256_srlv_epi32(_mm256_set1_epi32(word), bits);
}
static inline TARGET Planes_avx2 planes_avx2(const float *values) {
    Planes_avx2 planes;
    for (int j = 0; j < 4; j++) {
        uint8_t bytes[16];
        for (int i = 0; i < 16; i++) bytes[i] = ((const uint8_t *)values)[4 * i + j];
        planes.plane[j] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)bytes));
    }
    return planes;
}
/* Looking up bytes, 32 at once, and zipping them is twice as fast as looking up floats. */
static inline TARGET void unpack_avx2(Planes_avx2 planes, const uint8_t *codes, __m256 *w) {
    const __m256i pairs = _mm256_loadu_si256((const __m256i *)codes);
    for (int odd = 0; odd < 2; odd++, w += 4) {
        const __m256i index =
            _mm256_and_si256(odd ? pairs : _mm256_srli_epi16(pairs, 4), _mm256_set1_epi8(15));
        __m256i bytes[4];
        for (int j = 0; j < 4; j++) bytes[j] = _mm256_shuffle_epi8(planes.plane[j], index);
        const __m256i a = _mm256_unpacklo_epi8(bytes[0], bytes[1]);
        const __m256i b = _mm256_unpacklo_epi8(bytes[2], bytes[3]);
        const __m256i c = _mm256_unpackhi_epi8(bytes[0], bytes[1]);
        const __m256i d = _mm256_unpackhi_epi8(bytes[2], bytes[3]);
        w[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(a, b));
        w[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(a, b));
        w[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(c, d));
        w[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(c, d));
    }
}
static inline TARGET float total_avx2(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
#define ISA(name) name##_avx2
#define W 8
#define Vec __m256
#define Table Table_avx2
#define new_table table_avx2
#define lookup lookup_avx2
#define spread spread_avx2
#define Planes Planes_avx2
#define new_planes planes_avx2
#define unpack unpack_avx2
#define POSITION(k, i) (32 * ((i) / 4) + 8 * ((k) % 4) + 2 * ((i) % 4) + (k) / 4)
#define set1 _mm256_set1_ps
#define load _mm256_loadu_ps
#define store _mm256_storeu_ps
#define add _mm256_add_ps
#define mul _mm256_mul_ps
#define muladd _mm256_fmadd_ps
#define few_scales(absmax, places) \
    _mm256_setr_m128(_mm_set1_ps((absmax)[0]), _mm_set1_ps((absmax)[1]))
#define total total_avx2
#include "nf4_cpu_kernels.h"

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
static inline TARGET __m512i spread_avx512(const uint8_t *p) {
    int32_t words[2];
    memcpy(words, p, sizeof words);
    const __m512i bits =
        _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
    const __m512i both = _mm512_mask_set1_epi32(_mm512_set1_epi32(words[0]), 0xff00, words[1]);
    return _mm512_srlv_epi32(both, bits);
}
static inline TARGET __m512 few_scales_avx512(const float *absmax, int places) {
    const __m512i i = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 scales = _mm512_maskz_loadu_ps(places == 8 ? 3 : 15, absmax);
    const __m512i bits = _mm512_set1_epi32(places == 8 ? 3 : 2);
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(i, bits), scales);
}
#define ISA(name) name##_avx512
#define W 16
#define Vec __m512
#define Table __m512
#define new_table _mm512_loadu_ps
#define lookup(table, codes) _mm512_permutexvar_ps(codes, table)
#define spread spread_avx512
#define Planes __m512
#define new_planes _mm512_loadu_ps
#define unpack UNPACK_WORDS
#define POSITION WORD_POSITION
#define load_words _mm512_loadu_si512
#define drop _mm512_srli_epi32
#define set1 _mm512_set1_ps
#define load _mm512_loadu_ps
#define store _mm512_storeu_ps
#define add _mm512_add_ps
#define mul _mm512_mul_ps
#define muladd _mm512_fmadd_ps
#define few_scales few_scales_avx512
#define total _mm512_reduce_add_ps
#include "nf4_cpu_kernels.h"

#elif defined __AARCH64EL__
#define NEON
#include <arm_neon.h>

static inline uint8x16x4_t table_neon(const float *values) {
    uint8x16x4_t table;
    for (int j = 0; j < 4; j++) table.val[j] = vld1q_u8((const uint8_t *)values + 16 * j);
    return table;
}
static inline float32x4_t lookup_neon(uint8x16x4_t table, uint32x4_t codes) {
    const uint32x4_t code = vandq_u32(codes, vdupq_n_u32(15)); /* to its value's four bytes */
    const uint32x4_t bytes = vmlaq_n_u32(vdupq_n_u32(0x03020100), code, 0x04040404);
    return vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(bytes)));
}
static inline uint32x4_t spread_neon(const uint8_t *p) {
    const int32x4_t bits = {-4, 0, -12, -8};
    return vshlq_u32(vdupq_n_u32(p[0] | p[1] << 8), bits);
}
#define ISA(name) name##_neon
#define TARGET
#define W 4
#define Vec float32x4_t
#define Table uint8x16x4_t
#define new_table table_neon
#define lookup lookup_neon
#define spread spread_neon
#define Planes uint8x16x4_t
#define new_planes table_neon
#define unpack UNPACK_WORDS
#define POSITION WORD_POSITION
#define load_words(p) vreinterpretq_u32_u8(vld1q_u8(p))
#define drop(words, bits) vshlq_u32(words, vdupq_n_s32(-(bits)))
#define set1 vdupq_n_f32
#define load vld1q_f32
#define store vst1q_f32
#define add vaddq_f32
#define mul vmulq_f32
#define muladd(a, b, c) vfmaq_f32(c, a, b)
#define few_scales(absmax, places) set1(*(absmax))
#define total vaddvq_f32
#include "nf4_cpu_kernels.h"
#endif
