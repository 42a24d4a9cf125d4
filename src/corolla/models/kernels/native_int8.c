/* Activations, and whole products, in 8 bits; see native.c.
 *
 * Invariant: a row's result has the same bits in any company. Nothing is allocated and nothing is checked here.
 */
#include "lanes.h"
#include "native.h"

/* --- activations in 8 bits ------------------------------------------------------------------------------ */

/* Divide each row of x [rows, in] by a step of its own, so that its largest entry is `levels`. */
void scale_rows(const float *x, float *scaled, float *steps, int64_t rows, int64_t in, float levels, float least) {
    for (int64_t r = 0; r < rows; r++, x += in, scaled += in) {
        float largest = least;
        for (int64_t i = 0; i < in; i++) largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
        float step = steps[r] = largest / levels;
        for (int64_t i = 0; i < in; i++) scaled[i] = x[i] / step;
    }
}

/* --- weights and activations in 8 bits ------------------------------------------------------------------ */

/* Sums of four products of bytes at a time (VNNI). Activations are whole numbers of a step of their row, from -127 to
 * 127, kept 128 higher since the instruction wants them unsigned; what that adds is known (`sums`) and taken off. Sums
 * are exact, so a row's result has the same bits in any company. Weights lie as [out / 16, in / 4, 16, 4]. */
#define INT8_OUTS 16
#define FAR 4096 /* bytes by which weights are asked for before they are needed */

int knows_int8(void) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    return 1;
#else
    return 0;
#endif
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
typedef struct {
    const int8_t *values;
    const float *scales, *bias; /* [out]; bias may be NULL */
    const int32_t *sums;        /* 128 times what each output's weights add up to */
    int64_t in, out;
} Int8Weight;

/* Codes [in] of a row, and its step. */
static void int8_row(const float *x, int64_t in, float levels, float least, uint8_t *codes, float *step) {
    __m512 largest = _mm512_set1_ps(least);
    for (int64_t i = 0; i < in; i += 16) largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
    *step = _mm512_reduce_max_ps(largest) / levels;
    for (int64_t i = 0; i < in; i += 16) {
        __m512i whole = _mm512_cvtps_epi32(_mm512_div_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(*step)));
        whole = _mm512_add_epi32(whole, _mm512_set1_epi32(128));
        _mm_storeu_si128((__m128i *)(codes + i), _mm512_cvtusepi32_epi8(whole));
    }
}

/* Adds to 16 sums four products of bytes each. GCC 12 copies sums between registers around its own intrinsic. */
INLINE void dot(__m512i *sums, __m512i codes, __m512i weights) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*sums) : "v"(codes), "v"(weights));
}

/* `rows` rows times 16 * `blocks` outputs from `first` on. */
INLINE void int8_tile(const Int8Weight *w, int64_t first, int blocks, const uint8_t *codes, const float *steps,
                      float *y, int rows) {
    __m512i sums[8][2];
    for (int r = 0; r < rows; r++)
        for (int b = 0; b < blocks; b++)
            sums[r][b] = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(w->sums + first + 16 * b));
    const int8_t *values = w->values + first * w->in;
    for (int64_t i = 0; i < w->in; i += 4) {
        __m512i weight[2];
        for (int b = 0; b < blocks; b++) {
            const int8_t *from = values + 16 * (b * w->in + i);
            __builtin_prefetch(from + FAR);
            weight[b] = _mm512_loadu_si512(from);
        }
        for (int r = 0; r < rows; r++) {
            int32_t four;
            __builtin_memcpy(&four, codes + r * w->in + i, 4);
            for (int b = 0; b < blocks; b++)
                dot(&sums[r][b], _mm512_set1_epi32(four), weight[b]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int b = 0; b < blocks; b++) {
            int64_t at = first + 16 * b;
            __m512 result = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][b]), _mm512_loadu_ps(w->scales + at));
            result = _mm512_mul_ps(result, _mm512_set1_ps(steps[r]));
            if (w->bias) result = _mm512_add_ps(result, _mm512_loadu_ps(w->bias + at));
            _mm512_storeu_ps(y + r * w->out + at, result);
        }
}

INLINE void int8_rows(const Int8Weight *w, int64_t first, int blocks, const uint8_t *codes, const float *steps,
                      float *y, int64_t rows) {
#define TILE(ROWS)                                             \
    do {                                                       \
        int8_tile(w, first, blocks, codes, steps, y, ROWS);    \
        codes += ROWS * w->in, steps += ROWS, y += ROWS * w->out, rows -= ROWS; \
    } while (0)
    while (rows >= 8) TILE(8);
    while (rows >= 4) TILE(4);
    while (rows >= 1) TILE(1);
#undef TILE
}
#endif

/* y [rows, out] = x [rows, in] times the weight [out, in]; out a multiple of INT8_OUTS, in of 16. `codes` and `steps`
 * are [rows, in] and [rows] of scratch. */
void int8_product(const int8_t *values, const float *scales, const int32_t *sums, const float *bias, int64_t in,
                  int64_t out, const float *x, uint8_t *codes, float *steps, float *y, int64_t rows, float levels,
                  float least, int threads) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    Int8Weight w = {values, scales, bias, sums, in, out};
    int cpu = this_cpu();
    int64_t blocks = out / INT8_OUTS;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        keep_apart(cpu);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) int8_row(x + r * in, in, levels, least, codes + r * in, steps + r);
#pragma omp for schedule(static)
        for (int64_t pair = 0; pair < blocks / 2; pair++)
            int8_rows(&w, 2 * INT8_OUTS * pair, 2, codes, steps, y, rows);
    }
    if (blocks % 2) int8_rows(&w, INT8_OUTS * (blocks - 1), 1, codes, steps, y, rows);
#else
    (void)values, (void)scales, (void)sums, (void)bias, (void)in, (void)out, (void)x, (void)codes, (void)steps;
    (void)y, (void)rows, (void)levels, (void)least, (void)threads; /* see knows_int8 */
#endif
}
