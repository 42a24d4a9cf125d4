/* Products of weights and activations in 8 bits; see native.c.
 *
 * Invariant: activations are whole numbers of a step of their row, from -127 to 127, weights of a step of their output.
 * Sums of bytes are exact, so a row's result has the same bits beside any others, and with every instruction set. Nothing is
 * allocated and nothing is checked here.
 */
#include "threads.h"
#include "lanes.h"
#include "native.h"

/* Weights lie as [out / BLOCK, in / 4, BLOCK, 4], which every set reads as it lies. */
#define BLOCK 16
#define FAR 4096 /* bytes by which weights are asked for before they are needed */
#define VECTORS (BLOCK / LANES)
#define MOST_ROWS (LANES == BLOCK ? 8 : 4) /* side by side */

typedef struct {
    const int8_t *values;
    const float *scales, *bias; /* [out]; bias may be NULL */
    const int32_t *sums;        /* 128 times what each output's weights add up to */
    int64_t in, out;
} Int8Weight;

/* Codes [in] of a row, and its step. */
static void int8_row(const float *x, int64_t in, float levels, float least, uint8_t *codes, float *step) {
    vf largest = (vf){0} + least;
    for (int64_t i = 0; i < in; i += LANES) largest = max_lanes(abs_lanes(load(x + i)), largest);
    *step = largest_lane(largest) / levels;
    for (int64_t i = 0; i < in; i += LANES) {
        /* Rounded to the nearest whole number, which is then in the lowest bits. */
        vi whole = (vi)(load(x + i) / *step + 12582912.0f);
        store_bytes(codes + i, whole + ZERO);
    }
}

/* `rows` rows times BLOCK * `blocks` outputs from `first` on; both are constants where this is inlined. */
INLINE void int8_tile(const Int8Weight *w, int64_t first, const int blocks, const uint8_t *codes, const float *steps,
                      float *y, const int rows) {
    vi sums[MOST_ROWS][2 * VECTORS]; /* not as many as there are: such sums would not stay in registers */
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < blocks * VECTORS; v++)
            sums[r][v] = ZERO ? -load_whole(w->sums + first + v * LANES) : (vi){0};
    const int8_t *values = w->values + first * w->in;
    for (int64_t i = 0; i < w->in; i += 4) {
        Bytes weights[2 * VECTORS];
        for (int b = 0; b < blocks; b++) {
            const int8_t *from = values + BLOCK * (b * w->in + i);
            __builtin_prefetch(from + FAR);
            for (int v = 0; v < VECTORS; v++) weights[b * VECTORS + v] = weights_at(from + v * LANES * 4);
        }
        for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, codes + r * w->in + i, 4);
            for (int v = 0; v < blocks * VECTORS; v++) sums[r][v] = dot(sums[r][v], weights[v], four);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < blocks * VECTORS; v++) {
            int64_t at = first + v * LANES;
            vf result = __builtin_convertvector(sums[r][v], vf) * load(w->scales + at);
            store(y + r * w->out + at, result * steps[r]);
        }
    if (!w->bias) return;
    __asm__("" ::: "memory"); /* else some sets would fuse the product with the sum, and have other bits */
    for (int r = 0; r < rows; r++)
        for (int64_t at = first; at < first + blocks * BLOCK; at += LANES)
            store(y + r * w->out + at, load(y + r * w->out + at) + load(w->bias + at));
}

/* `rows` rows times one or two blocks: many rows take one at a time where registers are few. */
INLINE void int8_rows(const Int8Weight *w, int64_t first, const int blocks, const uint8_t *codes, const float *steps,
                      float *y, int64_t rows) {
    const int side_by_side = LANES == BLOCK ? blocks : 1;
#define TILE(ROWS)                                                                                   \
    do {                                                                                             \
        for (int b = 0; b < blocks; b += side_by_side)                                               \
            int8_tile(w, first + b * BLOCK, side_by_side, codes, steps, y, ROWS);                    \
        codes += ROWS * w->in, steps += ROWS, y += ROWS * w->out, rows -= ROWS;                      \
    } while (0)
    while (rows >= MOST_ROWS) TILE(MOST_ROWS);
    while (rows >= 4) TILE(4);
#undef TILE
    for (; rows >= 1; rows--, codes += w->in, steps++, y += w->out) int8_tile(w, first, blocks, codes, steps, y, 1);
}

/* y [rows, out] = x [rows, in] times the weight [out, in]; out a multiple of BLOCK, in of 16. `codes` and `steps`
 * are [rows, in] and [rows] of scratch. To be called by every thread of a team, which do not wait at the end. */
void int8_share(const int8_t *values, const float *scales, const int32_t *sums, const float *bias, int64_t in,
                int64_t out, const float *x, uint8_t *codes, float *steps, float *y, int64_t rows, float levels,
                float least) {
    Int8Weight w = {values, scales, bias, sums, in, out};
    int64_t blocks = out / BLOCK;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) int8_row(x + r * in, in, levels, least, codes + r * in, steps + r);
#pragma omp for schedule(static) nowait
    for (int64_t first = 0; first < blocks; first += 2) {
        if (first + 1 < blocks) int8_rows(&w, BLOCK * first, 2, codes, steps, y, rows);
        else int8_rows(&w, BLOCK * first, 1, codes, steps, y, rows);
    }
}

/* The same by `threads` threads. */
void int8_product(const int8_t *values, const float *scales, const int32_t *sums, const float *bias, int64_t in,
                  int64_t out, const float *x, uint8_t *codes, float *steps, float *y, int64_t rows, float levels,
                  float least, int threads) {
    int cpu = this_cpu();
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        keep_apart(cpu);
        int8_share(values, scales, sums, bias, in, out, x, codes, steps, y, rows, levels, least);
    }
}
