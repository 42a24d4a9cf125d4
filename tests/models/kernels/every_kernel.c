/* Runs every kernel on numbers that are the same on every CPU, and prints what comes out, a line each. */
#include "native.h"
#include <stdio.h>
#include <string.h>

void narrow_widen(int form, const void *values, const void *steps, const void *offsets, int half_steps, int shift,
                  int64_t in, int64_t out, float *to, int threads);
void run_program(const void *ops, int64_t count, const void *tables, float *scores, uint8_t *codes, float *steps,
                 int threads);

static uint32_t state = 1;
static uint32_t next(void) { return state = state * 1664525u + 1013904223u, state >> 8; }
static float number(void) { return (float)(int32_t)(next() % 65536) / 32768.0f - 1.0f; }

static void fill(float *to, int count) {
    for (int i = 0; i < count; i++) to[i] = number();
}

static void print(const char *name, int form, int rows, const float *from, int count) {
    for (int i = 0; i < count; i++) printf("%s-%d-%d %.9g\n", name, form, rows, from[i]);
}

enum { OUT = 48, IN = 96, MOST = 9 };

static void narrow(int form, int half, int shift) {
    static uint8_t values[OUT * IN * 4];
    static float steps[OUT * IN], offsets[OUT * IN], x[MOST * IN], y[MOST * OUT], wide[OUT * IN];
    for (unsigned i = 0; i < sizeof values; i++) values[i] = (uint8_t)next();
    if (form == FLOAT32) fill((float *)values, OUT * IN);
    for (int i = 0; i < OUT * IN && (form == BFLOAT16 || form == FLOAT16); i++) /* of moderate size */
        ((uint16_t *)values)[i] = (uint16_t)((next() & 0x83ff) | (form == BFLOAT16 ? 0x3f00 : 0x3000));
    fill(steps, OUT * IN), fill(offsets, OUT * IN);
    for (int i = 0; i < OUT * IN && half; i++)
        ((uint16_t *)steps)[i] = (uint16_t)(next() & 0x87ff), ((uint16_t *)offsets)[i] = (uint16_t)(next() & 0xafff);
    narrow_widen(form, values, steps, offsets, half, shift, IN, OUT, wide, 1);
    print("widen", form, half, wide, OUT * IN);
    for (int rows = 1; rows <= MOST; rows += rows < 4 ? 1 : 5) {
        fill(x, rows * IN);
        narrow_product(form, values, steps, offsets, half, shift, IN, OUT, NULL, x, y, rows, 1);
        print("product", form, rows, y, rows * OUT);
    }
}

static void bytes(void) {
    static int8_t values[OUT * IN];
    static uint8_t codes[MOST * IN];
    static float scales[OUT], bias[OUT], x[MOST * IN], steps[MOST], y[MOST * OUT];
    static int32_t sums[OUT];
    for (int i = 0; i < OUT * IN; i++) { /* [out / 16, in / 4, 16, 4] */
        values[i] = (int8_t)(next() % 255 - 127);
        sums[i / (16 * IN) * 16 + i / 4 % 16] += 128 * values[i];
    }
    fill(scales, OUT), fill(bias, OUT);
    for (int rows = 1; rows <= MOST; rows += rows < 4 ? 1 : 5) {
        fill(x, rows * IN);
        int8_product(values, scales, sums, rows == 2 ? NULL : bias, IN, OUT, x, codes, steps, y, rows, 127, 1e-30f, 1);
        print("bytes", INT8, rows, y, rows * OUT);
    }
}

static void attention(int dim, int width, float softcap, int64_t window) {
    enum { ROWS = 3, HEADS = 6, KV = 2, PAGE = 16, PAGES = 3, ROOM = 48 };
    static float query[ROWS * HEADS * 80], key[ROWS * KV * 80], value[ROWS * KV * 80], out[ROWS * HEADS * 80];
    static float keys[9 * PAGE * KV * 80], values[9 * PAGE * KV * 80], scores[HEADS / KV * ROOM], sinks[HEADS];
    static const int32_t pages[ROWS * PAGES] = {4, 0, 0, 7, 2, 0, 1, 8, 5};
    static const int64_t lengths[ROWS] = {1, 20, 41};
    fill(query, ROWS * HEADS * dim), fill(key, ROWS * KV * dim), fill(value, ROWS * KV * width);
    fill(keys, 9 * PAGE * KV * dim), fill(values, 9 * PAGE * KV * width), fill(sinks, HEADS);
    attend_rows(query, dim, HEADS * dim, key, dim, KV * dim, value, width, KV * width, NULL, 0, 0, keys, values,
                NULL, pages, lengths, ROWS, HEADS, KV, dim, width, 0, PAGE, PAGES, 0.3f, softcap, window, sinks,
                window ? sinks : NULL, scores, ROOM, out, 1);
    print("attend", dim + width, (int)window, out, ROWS * HEADS * width);
}

static void one_by_one(void) {
    struct { /* as in native_program.c */
        int64_t kind;
        float *out;
        const void *in[3];
        int64_t size[4], stride[4][4];
        double number;
        const void *what;
    } op = {.size = {1, 1, 1, 37}, .stride = {{0, 0, 0, 1}, {0, 0, 0, 1}, {0, 0, 0, 1}}, .number = 1e-5};
    static float from[37], other[37], ones[37], out[37];
    fill(from, 37), fill(other, 37), fill(ones, 37);
    for (int i = 0; i < 37; i++) from[i] = 0.1f + 4 * from[i] * from[i], other[i] += 2;
    op.out = out, op.in[0] = from, op.in[1] = other, op.in[2] = ones;
    for (op.kind = 2; op.kind < 46; op.kind++) {
        if (op.kind == 4 || (op.kind >= 36 && op.kind < 43)) continue; /* of whole numbers */
        memset(out, 0, sizeof out);
        run_program(&op, 1, NULL, NULL, NULL, NULL, 1);
        print("op", (int)op.kind, 0, out, 37);
    }
}

int main(void) {
    for (int half = 0; half < 2; half++) narrow(BYTES, half, 5), narrow(BYTES, half, 4), narrow(NIBBLES, half, 5), narrow(FLOAT8, half, 5);
    narrow(FLOAT32, 0, 0), narrow(BFLOAT16, 0, 0), narrow(FLOAT16, 0, 0);
    bytes();
    attention(16, 16, 0, 0), attention(64, 64, 2, 0), attention(80, 80, 0, 7), attention(32, 32, 0, 16);
    attention(48, 32, 0, 0), attention(16, 80, 0, 7);
    one_by_one();
    return 0;
}
