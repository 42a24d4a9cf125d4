/* What differs between CPUs: once for each instruction set, chosen when the kernels are built (native.py: SETS).
 *
 * A set says how many LANES a vector of float32 has and how many REGISTERS there are, widens what is kept narrow,
 * adds and compares lanes, and multiplies bytes. Everything else is written once, in native*.c, with these and with
 * the vector extensions of GCC and Clang (`a * b + c` on vectors is what it says). Every set gives the same sums of
 * bytes; sums of float32 differ by rounding, since lanes are added up in another order.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(ISA_AVX2) || defined(ISA_AVX_VNNI) || defined(ISA_AVX512)
#include <immintrin.h>
#elif defined(ISA_NEON)
#include <arm_neon.h>
#endif

#if defined(ISA_AVX512)
#define LANES 16
#elif defined(ISA_AVX2) || defined(ISA_AVX_VNNI)
#define LANES 8
#else
#define LANES 4
#endif
#if defined(ISA_AVX512) || defined(ISA_NEON)
#define REGISTERS 32
#else
#define REGISTERS 16
#endif

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef vf vf_at __attribute__((aligned(4), may_alias)); /* wherever it stands in memory */
typedef vi vi_at __attribute__((aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline, unused))

INLINE vf load(const float *from) { return *(const vf_at *)from; }
INLINE void store(float *to, vf value) { *(vf_at *)to = value; }
INLINE vi load_whole(const int32_t *from) { return *(const vi_at *)from; }

/* Of each set:
 *   whole_at                                        LANES bytes with a sign
 *   nibbles_at, bfloat16_at, float16_at             LANES numbers as float32; nibbles: of as many bytes the lower and
 *                                                   the upper halves
 *   sum_lanes, largest_lane, max_lanes              max_lanes(a, b): b where a is not a number
 *   store_bytes                                     the lowest byte of each lane
 *   Bytes, weights_at, dot                          adds to LANES sums four products of bytes each: of weights that lie
 *                                                   together and of the same four codes, which are ZERO higher than
 *                                                   the numbers that they stand for. All numbers are -127 to 127. */

#if defined(ISA_AVX512) /* ------------------------------------------------------------- AVX-512 with VNNI */

INLINE vi whole_at(const int8_t *from) {
    return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from));
}

INLINE void nibbles_at(const uint8_t *from, vf *low, vf *high) {
    __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
    *low = (vf)_mm512_cvtepi32_ps(_mm512_and_si512(both, _mm512_set1_epi32(15)));
    *high = (vf)_mm512_cvtepi32_ps(_mm512_srli_epi32(both, 4));
}

INLINE vf bfloat16_at(const uint16_t *from) {
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
}

INLINE vf float16_at(const uint16_t *from) {
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
}

INLINE float sum_lanes(vf value) { return _mm512_reduce_add_ps((__m512)value); }
INLINE float largest_lane(vf value) { return _mm512_reduce_max_ps((__m512)value); }
INLINE vf max_lanes(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }

INLINE void store_bytes(uint8_t *to, vi value) {
    _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8((__m512i)value));
}

#define ZERO 128
typedef __m512i Bytes;
INLINE Bytes weights_at(const int8_t *from) { return _mm512_loadu_si512(from); }

INLINE vi dot(vi sums, Bytes weights, int32_t codes) {
    __m512i four = _mm512_set1_epi32(codes), added = (__m512i)sums;
    /* Not its intrinsic, around which GCC 12 copies sums between registers. */
    __asm__("vpdpbusd %2, %1, %0" : "+v"(added) : "v"(four), "v"(weights));
    return (vi)added;
}

#elif defined(ISA_AVX2) || defined(ISA_AVX_VNNI) /* -------------------------------- AVX2 with FMA and F16C */

INLINE vi whole_at(const int8_t *from) {
    return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from));
}

INLINE void nibbles_at(const uint8_t *from, vf *low, vf *high) {
    __m256i both = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
    *low = (vf)_mm256_cvtepi32_ps(_mm256_and_si256(both, _mm256_set1_epi32(15)));
    *high = (vf)_mm256_cvtepi32_ps(_mm256_srli_epi32(both, 4));
}

INLINE vf bfloat16_at(const uint16_t *from) {
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)), 16);
}

INLINE vf float16_at(const uint16_t *from) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)); }

INLINE float sum_lanes(vf value) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128((__m256)value), _mm256_extractf128_ps((__m256)value, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

INLINE float largest_lane(vf value) {
    __m128 top = _mm_max_ps(_mm256_castps256_ps128((__m256)value), _mm256_extractf128_ps((__m256)value, 1));
    top = _mm_max_ps(top, _mm_movehl_ps(top, top));
    return _mm_cvtss_f32(_mm_max_ss(top, _mm_movehdup_ps(top)));
}

INLINE vf max_lanes(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }

INLINE void store_bytes(uint8_t *to, vi value) {
    __m256i lowest = _mm256_shuffle_epi8((__m256i)value, _mm256_set1_epi32(0x0c080400));
    int32_t lower = _mm256_cvtsi256_si32(lowest), upper = _mm256_extract_epi32(lowest, 4);
    memcpy(to, &lower, 4), memcpy(to + 4, &upper, 4);
}

#if defined(ISA_AVX_VNNI)
#define ZERO 128
typedef __m256i Bytes;
INLINE Bytes weights_at(const int8_t *from) { return _mm256_loadu_si256((const __m256i *)from); }

INLINE vi dot(vi sums, Bytes weights, int32_t codes) {
    __m256i four = _mm256_set1_epi32(codes), added = (__m256i)sums;
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(added) : "x"(four), "x"(weights));
    return (vi)added;
}
#else
/* The instruction multiplies bytes without a sign by bytes with one, and adds pairs of products in 16 bits: sizes of
 * weights times codes with the weights' signs, so that 2 * 127 * 127 fits. */
#define ZERO 0
typedef struct {
    __m256i values, sizes;
} Bytes;

INLINE Bytes weights_at(const int8_t *from) {
    __m256i values = _mm256_loadu_si256((const __m256i *)from);
    return (Bytes){values, _mm256_abs_epi8(values)};
}

INLINE vi dot(vi sums, Bytes weights, int32_t codes) {
    __m256i pairs = _mm256_maddubs_epi16(weights.sizes, _mm256_sign_epi8(_mm256_set1_epi32(codes), weights.values));
    return sums + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#endif

#elif defined(ISA_NEON) /* ------------------------------------------------------- NEON with its dot product */

INLINE int16x4_t four_bytes_at(const int8_t *from) {
    int32_t four;
    memcpy(&four, from, 4);
    return vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))));
}

INLINE vi whole_at(const int8_t *from) { return (vi)vmovl_s16(four_bytes_at(from)); }

INLINE void nibbles_at(const uint8_t *from, vf *low, vf *high) {
    uint32x4_t both = vandq_u32(vreinterpretq_u32_s32(vmovl_s16(four_bytes_at((const int8_t *)from))), vdupq_n_u32(255));
    *low = (vf)vcvtq_f32_u32(vandq_u32(both, vdupq_n_u32(15)));
    *high = (vf)vcvtq_f32_u32(vshrq_n_u32(both, 4));
}

INLINE vf bfloat16_at(const uint16_t *from) { return (vf)vshll_n_u16(vld1_u16(from), 16); }
INLINE vf float16_at(const uint16_t *from) { return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from))); }
INLINE float sum_lanes(vf value) { return vaddvq_f32((float32x4_t)value); }
INLINE float largest_lane(vf value) { return vmaxvq_f32((float32x4_t)value); }

INLINE vf max_lanes(vf a, vf b) {
    return (vf)vbslq_f32(vcgtq_f32((float32x4_t)a, (float32x4_t)b), (float32x4_t)a, (float32x4_t)b);
}

INLINE void store_bytes(uint8_t *to, vi value) {
    int16x4_t half = vmovn_s32((int32x4_t)value);
    int32_t four = vget_lane_s32(vreinterpret_s32_s8(vmovn_s16(vcombine_s16(half, half))), 0);
    memcpy(to, &four, 4);
}

#define ZERO 0
typedef int8x16_t Bytes;
INLINE Bytes weights_at(const int8_t *from) { return vld1q_s8(from); }

INLINE vi dot(vi sums, Bytes weights, int32_t codes) {
    return (vi)vdotq_s32((int32x4_t)sums, weights, vreinterpretq_s8_s32(vdupq_n_s32(codes)));
}

#else /* ----------------------------------------------------------------------------------------- plain C */

typedef uint8_t vn __attribute__((vector_size(LANES)));
typedef vn vn_at __attribute__((aligned(1), may_alias));
typedef int8_t vb_at __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint16_t vh_at __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

INLINE vi whole_at(const int8_t *from) { return __builtin_convertvector(*(const vb_at *)from, vi); }

INLINE void nibbles_at(const uint8_t *from, vf *low, vf *high) {
    vn both = *(const vn_at *)from;
    *low = __builtin_convertvector(both & 15, vf);
    *high = __builtin_convertvector(both >> 4, vf);
}

INLINE vf bfloat16_at(const uint16_t *from) {
    return (vf)(__builtin_convertvector(*(const vh_at *)from, vu) << 16);
}

/* Its exponent is 112 less than float32's; what is infinite or not a number has the largest of all. */
INLINE vf float16_at(const uint16_t *from) {
    vu half = __builtin_convertvector(*(const vh_at *)from, vu), size = half & 0x7fff;
    vu finite = (vu)((vf)(size << 13) * 0x1p112f), other = size << 13 | 0x7f800000u, is_other = (vu)(size > 0x7bff);
    return (vf)((half & 0x8000) << 16 | (other & is_other) | (finite & ~is_other));
}

INLINE float sum_lanes(vf value) { return (value[0] + value[2]) + (value[1] + value[3]); }

INLINE vf max_lanes(vf a, vf b) {
    vi above = a > b;
    return (vf)(((vi)a & above) | ((vi)b & ~above));
}

INLINE float largest_lane(vf value) {
    float top = value[0];
    for (int i = 1; i < LANES; i++) top = value[i] > top ? value[i] : top;
    return top;
}

INLINE void store_bytes(uint8_t *to, vi value) {
    for (int i = 0; i < LANES; i++) to[i] = (uint8_t)value[i];
}

#define ZERO 0
typedef const int8_t *Bytes;
INLINE Bytes weights_at(const int8_t *from) { return from; }

INLINE vi dot(vi sums, Bytes weights, int32_t codes) {
    int8_t four[4];
    memcpy(four, &codes, 4);
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < 4; j++) sums[i] += weights[4 * i + j] * four[j];
    return sums;
}

#endif /* --------------------------------------------------------------------------------- of every set */

INLINE vf bytes_at(const int8_t *from) { return __builtin_convertvector(whole_at(from), vf); }

/* 8-bit floats, E4M3: their exponent is 120 less than float32's. Those that are subnormal, whose exponent is 0, are as
   far from 2^-6 as its fraction says: no number on the way is one that a thread which flushes subnormals takes for 0.
   None of them stands for what is not a number here. */
INLINE vf float8_at(const int8_t *from) {
    vi bits = whole_at(from);
    vi subnormal = ((bits & 0x78) - 1) >> 31;
    vf size = (vf)(((bits & 0x7f) << 20) + (120 << 23) + (subnormal & (1 << 23))) - (vf)(subnormal & (121 << 23));
    return (vf)((vi)size | (bits & INT32_MIN));
}

INLINE vf abs_lanes(vf x) { return (vf)((vi)x & 0x7fffffff); }

/* exp(x) for x <= 0, to about 1e-7 of its value: 2^n times a polynomial (Cephes' expf). */
INLINE vf exp_lanes(vf x) {
    x = max_lanes(x, (vf){0} - 87.0f);
    vi n = __builtin_convertvector(x * 1.44269504f - 0.5f, vi); /* truncates towards 0, x is negative: rounds */
    vf whole = __builtin_convertvector(n, vf);
    vf r = x - whole * 0.693359375f;
    r = r - whole * -2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vf)((n + 127) << 23);
}
