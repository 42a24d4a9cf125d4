/* Kernels for passes of few rows, where reading weights and calling operators is what takes the time.
 *
 * Invariant: all arithmetic is float32, and how many threads compute changes no bit of a result. Nothing is
 * allocated and nothing is checked here: native.py knows what each function asks of its arguments. Plain C over the
 * few primitives of lanes.h, so that one source serves whatever CPU it is built for.
 */
#include "threads.h"
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

/* Forms (native.h): FLOAT32, BFLOAT16 and FLOAT16 are the weights themselves. Of the others a weight is value * step +
 * offset: values are int8, 8-bit floats (E4M3), or 4 bits without a sign; bytes 0 to 15 of a group of 32 hold columns 0
 * to 15 below and 16 to 31 above. */

typedef struct {
    const void *values;  /* [out, in] */
    const void *steps;   /* [out, in / group], float16 or float32 */
    const void *offsets; /* the same; NULL when all are 0 */
    int half_steps;      /* whether steps and offsets are float16 */
    int shift;           /* a group is 2^shift columns, 16 at least */
    int64_t in, out;
    const float *bias;   /* [out]; may be NULL */
} Weight;

#define OUTS 4  /* outputs that are computed side by side */
#define AHEAD 8 /* rows of the weight by which memory is asked before it is needed: rows are short, so the CPU does
                   not guess it. What lies behind the end is never read. */
#define FEW 2   /* rows of x that a narrow weight is multiplied with as it is read */

INLINE int64_t row_bytes(int form, const Weight *w) {
    if (form == BYTES || form == FLOAT8) return w->in;
    return form == NIBBLES ? w->in / 2 : form == FLOAT32 ? w->in * 4 : w->in * 2;
}

INLINE int is_grouped(int form) { return form == BYTES || form == FLOAT8 || form == NIBBLES; }

/* Values of one byte. */
INLINE vf byte_at(int form, const uint8_t *from) {
    return form == FLOAT8 ? float8_at((const int8_t *)from) : bytes_at((const int8_t *)from);
}

/* Columns `at` and behind of a weight row that is not in groups. */
INLINE vf number_at(int form, const void *row, int64_t at) {
    if (form == FLOAT32) return load((const float *)row + at);
    return form == BFLOAT16 ? bfloat16_at((const uint16_t *)row + at) : float16_at((const uint16_t *)row + at);
}

INLINE int64_t rounded_up(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

/* Steps or offsets `at` and behind. */
INLINE vf steps_at(const Weight *w, const void *from, int64_t at) {
    return w->half_steps ? float16_at((const uint16_t *)from + at) : load((const float *)from + at);
}

/* Those of a row [count] as float32, with zeros up to a multiple of LANES. */
INLINE void widen_steps(const Weight *w, const void *from, int64_t row, int64_t count, float *to) {
    const char *own = (const char *)from + row * count * (w->half_steps ? 2 : 4);
    store(to + rounded_up(count) - LANES, (vf){0});
    for (int64_t at = 0; at + LANES <= count; at += LANES) store(to + at, steps_at(w, own, at));
    if (count >= LANES) {
        store(to + count - LANES, steps_at(w, own, count - LANES));
        return;
    }
    float rest[LANES] = {0};
    for (int64_t i = 0; i < count; i++)
        if (w->half_steps) ((uint16_t *)rest)[i] = ((const uint16_t *)own)[i];
        else rest[i] = ((const float *)own)[i];
    store(to, steps_at(w, rest, 0));
}

/* Row `row` of the weight as float32 [in]. */
INLINE void widen_row(int form, const Weight *w, int64_t row, float *to) {
    const uint8_t *values = (const uint8_t *)w->values + row * row_bytes(form, w);
    if (!is_grouped(form)) {
        for (int64_t at = 0; at < w->in; at += LANES) store(to + at, number_at(form, values, at));
        return;
    }
    int64_t group = 1 << w->shift, groups = w->in >> w->shift;
    float steps[rounded_up(groups)], offsets[rounded_up(groups)];
    widen_steps(w, w->steps, row, groups, steps);
    if (w->offsets) widen_steps(w, w->offsets, row, groups, offsets);
    else memset(offsets, 0, sizeof offsets);
    for (int64_t g = 0; g < groups; g++, to += group, values += form == NIBBLES ? group / 2 : group) {
        __builtin_prefetch(values + AHEAD * row_bytes(form, w));
        if (form == NIBBLES)
            for (int64_t at = 0; at < 16; at += LANES) {
                vf low, high;
                nibbles_at(values + at, &low, &high);
                store(to + at, low * steps[g] + offsets[g]);
                store(to + at + 16, high * steps[g] + offsets[g]);
            }
        else
            for (int64_t at = 0; at < group; at += LANES)
                store(to + at, byte_at(form, values + at) * steps[g] + offsets[g]);
    }
}

/* --- one row or two ------------------------------------------------------------------------------------- */

/* `outs` outputs from `first` on of `rows` rows; the weight is read in its narrow form. */
INLINE void few_of_numbers(int form, const Weight *w, const float *x, float *y, int64_t first, int outs, int rows) {
    int64_t stride = row_bytes(form, w);
    const uint8_t *values = (const uint8_t *)w->values + first * stride;
    vf sums[OUTS][FEW] = {{{0}}};
    for (int64_t at = 0; at < w->in; at += LANES)
        for (int o = 0; o < outs; o++) {
            __builtin_prefetch(values + (AHEAD + o) * stride + at * (form == FLOAT32 ? 4 : 2));
            vf weight = number_at(form, values + o * stride, at);
            for (int r = 0; r < rows; r++) sums[o][r] += weight * load(x + r * w->in + at);
        }
    for (int o = 0; o < outs; o++)
        for (int r = 0; r < rows; r++) y[r * w->out + first + o] = sum_lanes(sums[o][r]);
}

/* What x [rows, in] adds up to in each group: [rows, rounded_up(in / group)]. */
INLINE void add_groups(const float *x, int64_t in, int64_t group, int rows, float *totals) {
    for (int r = 0; r < rows; r++)
        for (int64_t g = 0; g < rounded_up(in / group); g++) {
            vf total = {0};
            if (g < in / group)
                for (int64_t at = 0; at < group; at += LANES) total += load(x + r * in + g * group + at);
            *totals++ = sum_lanes(total);
        }
}

/* The same of weights in groups, `group` columns each; `totals` as add_groups gives them. */
INLINE void few_of_groups(int form, int64_t group, const Weight *w, const float *x, const float *totals, float *y,
                          int64_t first, int outs, int rows) {
    int64_t stride = row_bytes(form, w), groups = w->in / group, room = rounded_up(groups);
    const uint8_t *values = (const uint8_t *)w->values + first * stride;
    float steps[OUTS][room], offsets[room];
    vf sums[OUTS][FEW] = {{{0}}};
    for (int o = 0; o < outs; o++) widen_steps(w, w->steps, first + o, groups, steps[o]);
    for (int64_t g = 0; g < groups; g++, values += form == NIBBLES ? group / 2 : group) {
        vf parts[OUTS][FEW] = {{{0}}};
        for (int o = 0; o < outs; o++) __builtin_prefetch(values + (AHEAD + o) * stride);
        if (form == NIBBLES)
            for (int64_t at = 0; at < 16; at += LANES)
                for (int o = 0; o < outs; o++) {
                    vf low, high;
                    nibbles_at(values + o * stride + at, &low, &high);
                    for (int r = 0; r < rows; r++) {
                        const float *own = x + r * w->in + g * group + at;
                        parts[o][r] += low * load(own);
                        parts[o][r] += high * load(own + 16);
                    }
                }
        else
            for (int64_t at = 0; at < group; at += LANES)
                for (int o = 0; o < outs; o++) {
                    vf weight = byte_at(form, values + o * stride + at);
                    for (int r = 0; r < rows; r++) parts[o][r] += weight * load(x + r * w->in + g * group + at);
                }
        for (int o = 0; o < outs; o++)
            for (int r = 0; r < rows; r++) sums[o][r] += parts[o][r] * steps[o][g];
    }
    for (int o = 0; o < outs; o++) {
        if (w->offsets) {
            widen_steps(w, w->offsets, first + o, groups, offsets);
            for (int r = 0; r < rows; r++)
                for (int64_t g = 0; g < room; g += LANES)
                    sums[o][r] += load(offsets + g) * load(totals + r * room + g);
        }
        for (int r = 0; r < rows; r++) y[r * w->out + first + o] = sum_lanes(sums[o][r]);
    }
}

/* OUTS outputs of one row or two. Two rows take the outputs two by two where registers are few. */
INLINE void product_of_few(int form, int64_t group, const Weight *w, const float *x, const float *totals, float *y,
                           int64_t first, int rows) {
    const int outs = rows == 1 || REGISTERS > 16 ? OUTS : OUTS / 2;
    for (int64_t own = first; own < first + OUTS; own += outs) {
        if (is_grouped(form)) few_of_groups(form, group, w, x, totals, y, own, outs, rows);
        else few_of_numbers(form, w, x, y, own, outs, rows);
    }
}

/* --- more rows ------------------------------------------------------------------------------------------ */

#define SIDE_BY_SIDE (REGISTERS > 16 ? 4 : 3) /* rows of x, whose sums with OUTS outputs stay in registers */
#define LINE 64                               /* bytes that memory gives at once */

/* The same for any rows with OUTS weight rows that have been widened. Meanwhile memory is asked for the `bytes` at
 * `next`: spread over all of x, since a CPU waits for few lines at a time, and into a cache that x does not fill.
 * Where x is so short that they do not fit in, the CPU guesses well enough what comes. */
INLINE void product_of_many(const float *wide, int64_t in, int64_t out, const float *x, float *y, int rows,
                            const char *next, int64_t bytes) {
    int64_t tiles = rows / SIDE_BY_SIDE + 1, stride = bytes / (in / LANES * tiles);
    const char *end = stride < LINE ? next + bytes : next;
#define PRODUCT(ROWS)                                                                      \
    do {                                                                                   \
        vf sums[OUTS][ROWS] = {{{0}}};                                                     \
        for (int64_t at = 0; at < in; at += LANES, next += stride) {                       \
            if (next < end) __builtin_prefetch(next, 0, 2);                                \
            for (int o = 0; o < OUTS; o++) {                                               \
                vf weight = load(wide + o * in + at);                                      \
                for (int r = 0; r < ROWS; r++) sums[o][r] += weight * load(x + r * in + at); \
            }                                                                              \
        }                                                                                  \
        for (int o = 0; o < OUTS; o++)                                                     \
            for (int r = 0; r < ROWS; r++) y[r * out + o] = sum_lanes(sums[o][r]);         \
        x += ROWS * in, y += ROWS * out, rows -= ROWS;                                     \
    } while (0)
#if REGISTERS > 16
    while (rows >= 4) PRODUCT(4);
#endif
    while (rows >= 3) PRODUCT(3);
    if (rows == 2) PRODUCT(2);
    if (rows == 1) PRODUCT(1);
#undef PRODUCT
}

INLINE void product(int form, int64_t group, const Weight *w, const float *x, float *y, int64_t rows) {
    int64_t bytes = is_grouped(form) ? 0 : OUTS * row_bytes(form, w); /* widen_row asks for groups itself */
    float totals[is_grouped(form) ? FEW * rounded_up(w->in / group) : 1];
    if (is_grouped(form) && w->offsets && rows <= FEW) add_groups(x, w->in, group, (int)rows, totals);
#pragma omp for schedule(static) nowait
    for (int64_t first = 0; first < w->out; first += OUTS) {
        const char *own = (const char *)w->values + first * row_bytes(form, w);
        if (rows == 1) product_of_few(form, group, w, x, totals, y, first, 1);
        else if (rows == 2) product_of_few(form, group, w, x, totals, y, first, 2);
        else if (form == FLOAT32)
            product_of_many((const float *)own, w->in, w->out, x, y + first, (int)rows, own + bytes, bytes);
        else {
            float wide[OUTS * w->in] __attribute__((aligned(64)));
            for (int o = 0; o < OUTS; o++) widen_row(form, w, first + o, wide + o * w->in);
            product_of_many(wide, w->in, w->out, x, y + first, (int)rows, own + bytes, bytes);
        }
        for (int64_t r = 0; r < rows && w->bias; r++)
            for (int o = 0; o < OUTS; o++) y[r * w->out + first + o] += w->bias[first + o];
    }
}

/* y [rows, out] = x [rows, in] times the weight [out, in], and the bias. `out` is a multiple of OUTS, `in` of 16 and of
 * the group, which is 32 columns for NIBBLES, 16 or 32 for BYTES, and 32 or 128 for FLOAT8. To be called by every thread of a team, which
 * share the outputs and do not wait for each other at the end. */
void narrow_share(int form, const void *values, const void *steps, const void *offsets, int half_steps, int shift,
                  int64_t in, int64_t out, const float *bias, const float *x, float *y, int64_t rows) {
    Weight w = {values, steps, offsets, half_steps, shift, in, out, bias};
    if (form == FLOAT32) product(FLOAT32, 0, &w, x, y, rows);
    else if (form == BFLOAT16) product(BFLOAT16, 0, &w, x, y, rows);
    else if (form == FLOAT16) product(FLOAT16, 0, &w, x, y, rows);
    else if (form == NIBBLES) product(NIBBLES, 32, &w, x, y, rows);
    else if (form == FLOAT8 && shift == 7) product(FLOAT8, 128, &w, x, y, rows);
    else if (form == FLOAT8) product(FLOAT8, 32, &w, x, y, rows);
    else if (shift == 5) product(BYTES, 32, &w, x, y, rows);
    else product(BYTES, 16, &w, x, y, rows);
}

/* The same by `threads` threads. */
void narrow_product(int form, const void *values, const void *steps, const void *offsets, int half_steps, int shift,
                    int64_t in, int64_t out, const float *bias, const float *x, float *y, int64_t rows, int threads) {
    int cpu = this_cpu();
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        keep_apart(cpu);
        narrow_share(form, values, steps, offsets, half_steps, shift, in, out, bias, x, y, rows);
    }
}

/* The weight as float32 [out, in]. */
void narrow_widen(int form, const void *values, const void *steps, const void *offsets, int half_steps, int shift,
                  int64_t in, int64_t out, float *to, int threads) {
    Weight w = {values, steps, offsets, half_steps, shift, in, out, NULL};
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < out; row++) {
        if (form == FLOAT32) widen_row(FLOAT32, &w, row, to + row * in);
        else if (form == BFLOAT16) widen_row(BFLOAT16, &w, row, to + row * in);
        else if (form == FLOAT16) widen_row(FLOAT16, &w, row, to + row * in);
        else if (form == BYTES) widen_row(BYTES, &w, row, to + row * in);
        else if (form == FLOAT8) widen_row(FLOAT8, &w, row, to + row * in);
        else widen_row(NIBBLES, &w, row, to + row * in);
    }
}
