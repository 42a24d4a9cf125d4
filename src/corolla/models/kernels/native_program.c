/* A pass of a span's blocks in one call: the operators that models/compiled recorded, one after the other.
 *
 * Invariant: as in native.c. Between products and attention lie dozens of small operators a block; called from Python
 * they take longer than the products.
 */
#include "threads.h"
#include "lanes.h"
#include "native.h"

enum { /* layout.py: KINDS */
    PRODUCT, ATTEND, MEAN, LAYER_NORM, FROM_INT, ADD, SUB, MUL, DIV, COPY, NEG, ABS, SQUARE, CUBE, RSQRT, SQRT,
    RECIPROCAL, RELU, SILU, SIGMOID, TANH, GELU_TANH, GELU, EXP, SIN, COS
};

typedef struct {
    int64_t kind;
    float *out;
    const void *in[3];
    int64_t size[4];
    int64_t stride[3][4]; /* of out and of two inputs; 0 where an input is repeated */
    double number;        /* an epsilon */
    const void *what;     /* a Layer or an Attention */
} Op;

typedef struct {
    int64_t form, half_steps, shift, in, out;
    const void *values, *steps, *offsets;
    const float *bias;
    double levels, least; /* of activations in 8 bits */
} Layer;

typedef struct {
    float *keys, *values;
    const float *sinks, *slopes;
    int64_t heads, kv_heads, dim, page, window, table, threaded;
    double scale, softcap;
} Attention;

typedef struct { /* one table's rows, as in attend_rows */
    const int32_t *pages;
    const int64_t *lengths;
    int64_t most, room, total;
} Rows;

#define SHARED 16384 /* numbers from which threads share an operator */

/* --- products and attention ----------------------------------------------------------------------------- */

static void multiply(const Op *op, uint8_t *codes, float *steps, int threads) {
    const Layer *w = op->what;
    int64_t rows = op->size[0];
    if (w->form == INT8) {
        int8_product(w->values, w->steps, w->offsets, w->bias, w->in, w->out, op->in[0], codes, steps, op->out, rows,
                     (float)w->levels, (float)w->least, threads);
        return;
    }
    narrow_product((int)w->form, w->values, w->steps, w->offsets, (int)w->half_steps, (int)w->shift, w->in, w->out,
                   op->in[0], op->out, rows, threads);
    if (w->bias)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < w->out; i++) op->out[r * w->out + i] += w->bias[i];
}

static void attend(const Op *op, const Rows *tables, float *scores, int threads) {
    const Attention *a = op->what;
    const Rows *rows = tables + a->table;
    const int64_t *query = op->stride[0], *key = query + 2, *value = op->stride[1];
    attend_rows(op->in[0], query[0], query[1], op->in[1], key[0], key[1], op->in[2], value[0], value[1], a->keys,
                a->values, rows->pages, rows->lengths, op->size[0], a->heads, a->kv_heads, a->dim, a->page, rows->most,
                (float)a->scale, (float)a->softcap, a->window, a->sinks, a->slopes, scores, rows->room, op->out,
                rows->total * a->heads >= a->threaded ? threads : 1);
}

/* --- numbers one by one --------------------------------------------------------------------------------- */

/* 1 / (1 + exp(-x)) */
INLINE vf sigmoid(vf x) {
    vf e = exp_lanes((vf)((vu)x | 0x80000000u)); /* of -|x| */
    vf upper = 1.0f / (1.0f + e), lower = e * upper;
    vi negative = x < 0;
    return (vf)(((vi)lower & negative) | ((vi)upper & ~negative));
}

INLINE vf lanes_of(int kind, vf x) {
    switch (kind) {
    case SILU: return x * sigmoid(x);
    case SIGMOID: return sigmoid(x);
    case TANH: return 2.0f * sigmoid(2.0f * x) - 1.0f;
    default: return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x)); /* GELU_TANH */
    }
}

INLINE float number_of(int kind, float x) {
    switch (kind) {
    case NEG: return -x;
    case ABS: return fabsf(x);
    case SQUARE: return x * x;
    case CUBE: return x * x * x;
    case RSQRT: return 1.0f / sqrtf(x);
    case SQRT: return sqrtf(x);
    case RECIPROCAL: return 1.0f / x;
    case RELU: return x > 0 ? x : x < 0 ? 0 : x; /* what is not a number stays so */
    case GELU: return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    case EXP: return expf(x);
    case SIN: return sinf(x);
    case COS: return cosf(x);
    default: return x; /* COPY */
    }
}

/* Kinds of `lanes_of`, for lines that lie together; the last, incomplete lanes go by way of a copy. */
INLINE void line_of_lanes(int kind, float *to, const float *from, int64_t count) {
    int64_t at = 0;
    for (; at + LANES <= count; at += LANES) store(to + at, lanes_of(kind, load(from + at)));
    if (at == count) return;
    float rest[LANES] = {0};
    for (int64_t i = at; i < count; i++) rest[i - at] = from[i];
    store(rest, lanes_of(kind, load(rest)));
    for (int64_t i = at; i < count; i++) to[i] = rest[i - at];
}

INLINE void line_of_numbers(int kind, float *to, int64_t step, const float *from, int64_t own, int64_t count) {
    if (step == 1 && own == 1)
        for (int64_t i = 0; i < count; i++) to[i] = number_of(kind, from[i]);
    else
        for (int64_t i = 0; i < count; i++) to[i * step] = number_of(kind, from[i * own]);
}

static void line_of_one(int kind, float *to, int64_t step, const float *from, int64_t own, int64_t count) {
#define CASE(KIND) case KIND: line_of_numbers(KIND, to, step, from, own, count); break;
#define LANES_CASE(KIND)                                                             \
    case KIND:                                                                       \
        if (step == 1 && own == 1) line_of_lanes(KIND, to, from, count);             \
        else for (int64_t i = 0; i < count; i++) line_of_lanes(KIND, to + i * step, from + i * own, 1); \
        break;
    switch (kind) {
        CASE(COPY) CASE(NEG) CASE(ABS) CASE(SQUARE) CASE(CUBE) CASE(RSQRT) CASE(SQRT) CASE(RECIPROCAL) CASE(RELU)
        CASE(GELU) CASE(EXP) CASE(SIN) CASE(COS)
        LANES_CASE(SILU) LANES_CASE(SIGMOID) LANES_CASE(TANH) LANES_CASE(GELU_TANH)
    }
#undef CASE
#undef LANES_CASE
}

static void line_of_two(int kind, float *to, int64_t step, const float *a, int64_t of_a, const float *b, int64_t of_b,
                        int64_t count) {
#define LINE(STEP, A, B, SIGN) for (int64_t i = 0; i < count; i++) to[i * (STEP)] = a[i * (A)] SIGN b[i * (B)]
#define CASE(KIND, SIGN)                                                    \
    case KIND:                                                              \
        if (step == 1 && of_a == 1 && of_b == 1) LINE(1, 1, 1, SIGN);       \
        else if (step == 1 && of_a == 1 && of_b == 0) LINE(1, 1, 0, SIGN);  \
        else if (step == 1 && of_a == 0 && of_b == 1) LINE(1, 0, 1, SIGN);  \
        else LINE(step, of_a, of_b, SIGN);                                  \
        break;
    switch (kind) { CASE(ADD, +) CASE(SUB, -) CASE(MUL, *) CASE(DIV, /) }
#undef CASE
#undef LINE
}

/* --- whole lines ---------------------------------------------------------------------------------------- */

static float sum_of(const float *from, int64_t count) {
    vf sums = {0};
    int64_t at = 0;
    for (; at + LANES <= count; at += LANES) sums += load(from + at);
    float total = sum_lanes(sums);
    for (; at < count; at++) total += from[at];
    return total;
}

static void normalize(float *to, const float *from, const float *scale, const float *shift, int64_t count, float least) {
    float mean = sum_of(from, count) / (float)count;
    for (int64_t i = 0; i < count; i++) to[i] = (from[i] - mean) * (from[i] - mean);
    float factor = 1.0f / sqrtf(sum_of(to, count) / (float)count + least);
    for (int64_t i = 0; i < count; i++) to[i] = (from[i] - mean) * factor * scale[i] + shift[i];
}

static void line(const Op *op, int64_t number) {
    int64_t at[3] = {0}, count = op->size[3];
    for (int dim = 2; dim >= 0; dim--) {
        int64_t index = number % op->size[dim];
        number /= op->size[dim];
        for (int one = 0; one < 3; one++) at[one] += index * op->stride[one][dim];
    }
    float *to = op->out + at[0];
    const float *a = (const float *)op->in[0] + at[1];
    switch (op->kind) {
    case MEAN: *to = sum_of(a, count) / (float)count; break;
    case LAYER_NORM: normalize(to, a, op->in[1], op->in[2], count, (float)op->number); break;
    case FROM_INT:
        for (int64_t i = 0; i < count; i++)
            to[i * op->stride[0][3]] = (float)((const int64_t *)op->in[0])[at[1] + i * op->stride[1][3]];
        break;
    case ADD: case SUB: case MUL: case DIV:
        line_of_two((int)op->kind, to, op->stride[0][3], a, op->stride[1][3], (const float *)op->in[1] + at[2],
                    op->stride[2][3], count);
        break;
    default: line_of_one((int)op->kind, to, op->stride[0][3], a, op->stride[1][3], count);
    }
}

static void lines(const Op *op, int threads) {
    int64_t count = op->size[0] * op->size[1] * op->size[2];
    if (threads == 1 || count == 1 || count * op->size[3] < SHARED) {
        for (int64_t number = 0; number < count; number++) line(op, number);
        return;
    }
    int cpu = this_cpu();
#pragma omp parallel num_threads(threads)
    {
        keep_apart(cpu);
#pragma omp for schedule(static)
        for (int64_t number = 0; number < count; number++) line(op, number);
    }
}

/* Carry out `count` operators. `scores` as in attend_rows, for the longest; `codes` and `steps` as in int8_product,
 * for the widest. */
void run_program(const Op *ops, int64_t count, const Rows *tables, float *scores, uint8_t *codes, float *steps,
                 int threads) {
    for (const Op *op = ops; op < ops + count; op++) {
        if (op->kind == PRODUCT) multiply(op, codes, steps, threads);
        else if (op->kind == ATTEND) attend(op, tables, scores, threads);
        else lines(op, threads);
    }
}
