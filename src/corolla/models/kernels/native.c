/* Kernels for passes of few rows, where reading weights and calling operators is what takes the time.
 *
 * Invariant: all arithmetic is float32, and how many threads compute changes no bit of a result. Nothing is
 * allocated and nothing is checked here: native.py knows what each function asks of its arguments. Plain C with
 * the vector extensions of GCC and Clang, so that one source serves whatever CPU it is built on.
 */
#include "lanes.h"
#include "native.h"

/* Give the calling thread helpers, which wait for more work of it until it ends. */
void begin_team(int threads) {
#if defined(_OPENMP)
    volatile int begun = 0;
#pragma omp parallel num_threads(threads)
    {
#pragma omp atomic
        begun++;
    }
#else
    (void)threads;
#endif
}

/* End the threads that wait for more work of the calling one. More waiting threads than CPUs do not spin (libgomp). */
void end_team(void) {
#if defined(_OPENMP)
    omp_pause_resource_all(omp_pause_soft);
#endif
}

/* --- weights in a narrow form --------------------------------------------------------------------------- */

/* Forms (native.h): FLOAT32, BFLOAT16 and FLOAT16 are the weights themselves. Of the others a weight is value * step + offset: values are int8,
 * or 4 bits without a sign; bytes 0 to 15 of a group of 32 hold columns 0 to 15 below and 16 to 31 above. */

typedef struct {
    const void *values;   /* [out, in] */
    const void *steps;    /* [out, in / group], float16 or float32 */
    const void *offsets;  /* the same; NULL when all are 0 */
    int half_steps;       /* whether steps and offsets are float16 */
    int shift;            /* a group is 2^shift columns, at least LANES */
    int64_t in, out;
} Weight;

#define OUTS 4  /* outputs that are computed side by side */
#define AHEAD 8 /* rows of the weight by which memory is asked before it is needed: rows are short, so the CPU does
                   not guess it. What lies behind the end is never read. */

INLINE vf whole_bytes(const int8_t *from) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
#else
    return __builtin_convertvector(
        __builtin_convertvector(__builtin_convertvector(*(const vb_at *)from, vs), vi), vf);
#endif
}

/* Columns `at` and behind of a group of 32. */
INLINE vf whole_nibbles(const uint8_t *group, int64_t at) {
    const uint8_t *from = group + at % 16;
#if defined(__AVX512F__)
    __m128i bytes = _mm_loadu_si128((const __m128i *)from);
    if (at >= 16) bytes = _mm_srli_epi16(bytes, 4);
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_and_si128(bytes, _mm_set1_epi8(15))));
#else
    vn bytes = *(const vn_at *)from;
    bytes = at >= 16 ? bytes >> 4 : bytes & 15;
    return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(bytes, vs), vi), vf);
#endif
}

INLINE int is_plain(int form) { return form == FLOAT32 || form == BFLOAT16 || form == FLOAT16; }

INLINE int64_t row_bytes(int form, const Weight *w) {
    return form == NIBBLES ? w->in / 2 : form == BYTES ? w->in : w->in * (form == FLOAT32 ? 4 : 2);
}

/* Whole numbers of columns `at` and behind of a weight row that begins at `row`. */
INLINE vf whole(int form, const uint8_t *row, int64_t at) {
    return form == BYTES ? whole_bytes((const int8_t *)row + at) : whole_nibbles(row + at / 32 * 16, at % 32);
}

/* The weight's number `at` and behind, of a row that begins at `row`; of forms that are the weights themselves. */
INLINE vf numbers(int form, const void *row, int64_t at) {
    if (form == FLOAT32) return load((const float *)row + at);
    const uint16_t *from = (const uint16_t *)row + at;
    if (form == BFLOAT16) return (vf)(__builtin_convertvector(*(const vh_at *)from, vu) << 16);
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif defined(__FLT16_MAX__)
    typedef _Float16 vx_at __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
    return __builtin_convertvector(*(const vx_at *)from, vf);
#else
    return (vf){0} + NAN; /* native.py asks first, see `knows_float16` */
#endif
}

int knows_float16(void) {
#if defined(__FLT16_MAX__)
    return 1;
#else
    return 0;
#endif
}

INLINE float scalar(const void *from, int64_t place, int is_half) {
#if defined(__FLT16_MAX__)
    if (is_half) return (float)((const _Float16 *)from)[place];
#else
    (void)is_half;
#endif
    return ((const float *)from)[place];
}

/* Row `row` of the weight as float32 [in]. */
INLINE void widen_row(int form, const Weight *w, int64_t row, float *to) {
    const uint8_t *values = (const uint8_t *)w->values + row * row_bytes(form, w);
    if (is_plain(form)) {
        for (int64_t at = 0; at < w->in; at += LANES) store(to + at, numbers(form, values, at));
        return;
    }
    int64_t group = 1 << w->shift, place = row * (w->in >> w->shift);
    for (int64_t begin = 0; begin < w->in; begin += group, place++) {
        float step = scalar(w->steps, place, w->half_steps);
        float offset = w->offsets ? scalar(w->offsets, place, w->half_steps) : 0;
        __builtin_prefetch(values + AHEAD * row_bytes(form, w) + (form == NIBBLES ? begin / 2 : begin));
        for (int64_t at = begin; at < begin + group; at += LANES)
            store(to + at, whole(form, values, at) * step + offset);
    }
}

#define FEW 2   /* rows of x that a narrow weight is multiplied with as it is read */

/* OUTS outputs of one to FEW rows, the weight read in its narrow form. */
INLINE void product_of_few(int form, const Weight *w, const float *x, float *y, int64_t first, int rows) {
    int64_t stride = row_bytes(form, w);
    const uint8_t *values = (const uint8_t *)w->values + first * stride;
    vf sums[OUTS][FEW] = {{{0}}};
    if (is_plain(form)) {
        for (int64_t at = 0; at < w->in; at += LANES)
            for (int o = 0; o < OUTS; o++) {
                const uint8_t *row = values + o * stride;
                __builtin_prefetch(row + AHEAD * stride + at * (stride / w->in));
                vf weight = numbers(form, row, at);
                for (int r = 0; r < rows; r++) sums[o][r] += weight * load(x + r * w->in + at);
            }
    } else {
        int64_t group = 1 << w->shift, groups = w->in >> w->shift;
        for (int64_t g = 0; g < groups; g++) {
            vf parts[OUTS][FEW] = {{{0}}}, totals[FEW] = {{0}};
            for (int o = 0; o < OUTS; o++)
                __builtin_prefetch(values + (AHEAD + o) * stride + (form == NIBBLES ? g * group / 2 : g * group));
            for (int64_t at = g * group; at < (g + 1) * group; at += LANES) {
                for (int r = 0; r < rows; r++) totals[r] += load(x + r * w->in + at);
                for (int o = 0; o < OUTS; o++) {
                    vf weight = whole(form, values + o * stride, at);
                    for (int r = 0; r < rows; r++) parts[o][r] += weight * load(x + r * w->in + at);
                }
            }
            for (int o = 0; o < OUTS; o++) {
                int64_t place = (first + o) * groups + g;
                float step = scalar(w->steps, place, w->half_steps);
                float offset = w->offsets ? scalar(w->offsets, place, w->half_steps) : 0;
                for (int r = 0; r < rows; r++) sums[o][r] += parts[o][r] * step + totals[r] * offset;
            }
        }
    }
    for (int o = 0; o < OUTS; o++)
        for (int r = 0; r < rows; r++) y[r * w->out + first + o] = sum_lanes(sums[o][r]);
}

/* The same for any rows with OUTS weight rows that have been widened. */
INLINE void product_of_many(const float *wide, int64_t in, int64_t out, const float *x, float *y, int rows) {
#define PRODUCT(ROWS)                                                                      \
    do {                                                                                   \
        vf sums[OUTS][ROWS] = {{{0}}};                                                     \
        for (int64_t at = 0; at < in; at += LANES)                                         \
            for (int o = 0; o < OUTS; o++) {                                               \
                vf weight = load(wide + o * in + at);                                      \
                for (int r = 0; r < ROWS; r++) sums[o][r] += weight * load(x + r * in + at); \
            }                                                                              \
        for (int o = 0; o < OUTS; o++)                                                     \
            for (int r = 0; r < ROWS; r++) y[r * out + o] = sum_lanes(sums[o][r]);         \
        x += ROWS * in, y += ROWS * out, rows -= ROWS;                                     \
    } while (0)
    while (rows >= 4) PRODUCT(4);
    while (rows >= 1) PRODUCT(1);
#undef PRODUCT
}

INLINE void product(int form, const Weight *w, const float *x, float *y, int64_t rows, int threads) {
    int cpu = this_cpu();
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        keep_apart(cpu);
#pragma omp for schedule(static)
        for (int64_t first = 0; first < w->out; first += OUTS) {
            if (rows == 1) product_of_few(form, w, x, y, first, 1);
            if (rows == 2) product_of_few(form, w, x, y, first, 2);
            if (rows <= FEW) continue;
            if (form == FLOAT32) {
                product_of_many((const float *)w->values + first * w->in, w->in, w->out, x, y + first, (int)rows);
                continue;
            }
            float wide[OUTS * w->in] __attribute__((aligned(64)));
            for (int o = 0; o < OUTS; o++) widen_row(form, w, first + o, wide + o * w->in);
            product_of_many(wide, w->in, w->out, x, y + first, (int)rows);
        }
    }
}

/* y [rows, out] = x [rows, in] times the weight [out, in]. `out` is a multiple of OUTS, `in` of the group. */
void narrow_product(int form, const void *values, const void *steps, const void *offsets, int half_steps, int shift,
                    int64_t in, int64_t out, const float *x, float *y, int64_t rows, int threads) {
    Weight w = {values, steps, offsets, half_steps, shift, in, out};
    if (form == BFLOAT16) product(BFLOAT16, &w, x, y, rows, threads);
    else if (form == FLOAT16) product(FLOAT16, &w, x, y, rows, threads);
    else if (form == FLOAT32) product(FLOAT32, &w, x, y, rows, threads);
    else if (form == BYTES) product(BYTES, &w, x, y, rows, threads);
    else product(NIBBLES, &w, x, y, rows, threads);
}

/* The weight as float32 [out, in]. */
void narrow_widen(int form, const void *values, const void *steps, const void *offsets, int half_steps, int shift,
                  int64_t in, int64_t out, float *to, int threads) {
    Weight w = {values, steps, offsets, half_steps, shift, in, out};
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < out; row++) widen_row(form, &w, row, to + row * in);
}
