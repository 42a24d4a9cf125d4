/* A pass of a span's blocks in one call: the operators that models/compiled recorded, one after the other.
 *
 * Invariant: as in native.c. Between products and attention lie dozens of small operators a block; called from Python
 * they take longer than the products.
 */
#include "threads.h"
#include "lanes.h"
#include "native.h"

enum { /* layout.py: KINDS */
    PRODUCT, ATTEND, MEAN, LAYER_NORM, FROM_INT, ADD, SUB, MUL, DIV, MAXIMUM, MINIMUM, COPY, NEG, ABS, SQUARE,
    CUBE, RSQRT, SQRT, RECIPROCAL, RELU, SILU, SIGMOID, TANH, GELU_TANH, GELU, EXP, SIN, COS, FLOOR, LOG, EXPM1, NONZERO, GREATER, WHERE,
    SUM, SOFTMAX, TOP, GATHER, SCATTER, ROUTE, PICK, EXPERTS, COMBINE, SOFTPLUS, MUL_ADD, DOT
};

typedef struct {
    int64_t kind;
    float *out;
    const void *in[3];
    int64_t size[4];
    int64_t stride[4][4]; /* of out and of the inputs; 0 where an input is repeated */
    double number;        /* an epsilon, or how many are the TOP */
    const void *what;     /* a Layer, an Attention, or a Layer for each of some experts */
} Op;

typedef struct {
    int64_t form, half_steps, shift, in, out;
    const void *values, *steps, *offsets;
    const float *bias;
    double levels, least; /* of activations in 8 bits */
} Layer;

typedef struct {
    float *keys, *values, *beside; /* latents: keys and values are the same, rotary parts lie beside */
    const float *sinks, *slopes;
    int64_t heads, kv_heads, dim, width, extra, page, window, table, threaded;
    double scale, softcap;
} Attention;

typedef struct { /* one table's rows, as in attend_rows */
    const int32_t *pages;
    const int64_t *lengths;
    int64_t most, room, total;
} Rows;

#define SHARED 16384 /* numbers from which threads share an operator */

/* --- products and attention ----------------------------------------------------------------------------- */

/* y [rows, out] = x [rows, in] by a layer; to be called by every thread of a team. Both kinds of scratch are for these
 * rows alone, so the next product may begin while other threads are still at this one. */
static void share_product(const Layer *w, const float *x, float *y, int64_t rows, uint8_t *codes, float *steps) {
    if (w->form == INT8)
        int8_share(w->values, w->steps, w->offsets, w->bias, w->in, w->out, x, codes, steps, y, rows, (float)w->levels,
                   (float)w->least);
    else
        narrow_share((int)w->form, w->values, w->steps, w->offsets, (int)w->half_steps, (int)w->shift, w->in, w->out,
                     w->bias, x, y, rows);
}

static void multiply(const Op *op, uint8_t *codes, float *steps, int threads) {
    int cpu = this_cpu();
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        keep_apart(cpu);
        share_product(op->what, op->in[0], op->out, op->size[0], codes, steps);
    }
}

static void attend(const Op *op, const Rows *tables, float *scores, int threads) {
    const Attention *a = op->what;
    const Rows *rows = tables + a->table;
    const int64_t *query = op->stride[0], *key = query + 2, *third = op->stride[1];
    const float *value = a->beside ? NULL : op->in[2], *more = a->beside ? op->in[2] : NULL;
    attend_rows(op->in[0], query[0], query[1], op->in[1], key[0], key[1], value, third[0], third[1], more, third[0],
                third[1], a->keys, a->values, a->beside, rows->pages, rows->lengths, op->size[0], a->heads,
                a->kv_heads, a->dim, a->width, a->extra, a->page, rows->most, (float)a->scale, (float)a->softcap,
                a->window, a->sinks, a->slopes, scores, rows->room, op->out,
                rows->total * a->heads >= a->threaded ? threads : 1);
}

/* --- experts ---------------------------------------------------------------------------------------------- */

/* Each token is sent to `each` experts; token and expert are a pair. Pairs in the order of their experts, those of no
 * expert last: where each expert's begin [experts + 1], then the pairs [pairs]. */
static void route(const Op *op) {
    int64_t pairs = op->size[0], experts = op->size[1], *begins = (int64_t *)op->out, *order = begins + experts + 1;
    const int64_t *chosen = op->in[0];
    memset(begins, 0, (size_t)(experts + 1) * sizeof *begins);
    for (int64_t pair = 0; pair < pairs; pair++)
        if (chosen[pair] >= 0 && chosen[pair] < experts) begins[chosen[pair] + 1]++;
    for (int64_t one = 0; one < experts; one++) begins[one + 1] += begins[one];
    int64_t last = begins[experts];
    for (int64_t pair = 0; pair < pairs; pair++) {
        int known = chosen[pair] >= 0 && chosen[pair] < experts;
        order[known ? begins[chosen[pair]]++ : last++] = pair;
    }
    for (int64_t one = experts - 1; one > 0; one--) begins[one] = begins[one - 1]; /* they have moved to their ends */
    begins[0] = 0;
}

/* The tokens' numbers, pair by pair. */
static void pick(const Op *op) {
    int64_t pairs = op->size[0], experts = op->size[1], width = op->size[2], each = op->size[3];
    const int64_t *order = (const int64_t *)op->in[1] + experts + 1;
    for (int64_t at = 0; at < pairs; at++)
        memcpy(op->out + at * width, (const float *)op->in[0] + order[at] / each * width, (size_t)width * sizeof(float));
}

/* Each expert is read once, for all pairs that are its. */
static void multiply_experts(const Op *op, uint8_t *codes, float *steps, int threads) {
    int64_t experts = op->size[1];
    const int64_t *begins = op->in[1];
    const Layer *layers = op->what;
    int cpu = this_cpu();
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        keep_apart(cpu);
        for (int64_t one = 0; one < experts; one++) {
            const Layer *w = layers + one;
            int64_t begin = begins[one], rows = begins[one + 1] - begin;
            if (rows)
                share_product(w, (const float *)op->in[0] + begin * w->in, op->out + begin * w->out, rows,
                              codes + begin * w->in, steps + begin);
        }
    }
}

#define COLUMNS 256 /* of a result, which one thread adds up */

/* For each token what its experts gave, times their weights, added up by the experts' numbers. */
static void combine(const Op *op, int threads) {
    int64_t pairs = op->size[0], experts = op->size[1], width = op->size[2], each = op->size[3];
    const float *from = op->in[0], *weights = op->in[2];
    const int64_t *begins = op->in[1], *order = begins + experts + 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && pairs * width >= SHARED)
    for (int64_t first = 0; first < width; first += COLUMNS) {
        int64_t end = first + COLUMNS < width ? first + COLUMNS : width;
        for (int64_t row = 0; row < pairs / each; row++)
            memset(op->out + row * width + first, 0, (size_t)(end - first) * sizeof(float));
        for (int64_t at = 0; at < begins[experts]; at++) {
            float *to = op->out + order[at] / each * width, weight = weights[order[at]];
            for (int64_t i = first; i < end; i++) to[i] += weight * from[at * width + i];
        }
    }
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
    case FLOOR: return floorf(x);
    case LOG: return logf(x);
    case EXPM1: return expm1f(x);
    case SOFTPLUS: return x > 20 ? x : log1pf(expf(x));
    case NONZERO: return x != 0; /* what is true is 1, what is false is 0 */
    default: return x; /* COPY */
    }
}

/* Kinds of `lanes_of`; what does not lie together, and the last, incomplete lanes, go by way of a copy. */
INLINE void line_of_lanes(int kind, float *to, int64_t step, const float *from, int64_t own, int64_t count) {
    int64_t at = 0;
    if (step == 1 && own == 1)
        for (; at + LANES <= count; at += LANES) store(to + at, lanes_of(kind, load(from + at)));
    for (; at < count; at += LANES) {
        int64_t most = count - at < LANES ? count - at : LANES;
        float some[LANES] = {0};
        for (int64_t i = 0; i < most; i++) some[i] = from[(at + i) * own];
        store(some, lanes_of(kind, load(some)));
        for (int64_t i = 0; i < most; i++) to[(at + i) * step] = some[i];
    }
}

INLINE void line_of_numbers(int kind, float *to, int64_t step, const float *from, int64_t own, int64_t count) {
    if (step == 1 && own == 1)
        for (int64_t i = 0; i < count; i++) to[i] = number_of(kind, from[i]);
    else
        for (int64_t i = 0; i < count; i++) to[i * step] = number_of(kind, from[i * own]);
}

static void line_of_one(int kind, float *to, int64_t step, const float *from, int64_t own, int64_t count) {
#define CASE(KIND) case KIND: line_of_numbers(KIND, to, step, from, own, count); break;
#define LANES_CASE(KIND) case KIND: line_of_lanes(KIND, to, step, from, own, count); break;
    switch (kind) {
        CASE(COPY) CASE(NEG) CASE(ABS) CASE(SQUARE) CASE(CUBE) CASE(RSQRT) CASE(SQRT) CASE(RECIPROCAL) CASE(RELU)
        CASE(GELU) CASE(EXP) CASE(SIN) CASE(COS) CASE(FLOOR) CASE(LOG) CASE(EXPM1)
        CASE(NONZERO) CASE(SOFTPLUS)
        LANES_CASE(SILU) LANES_CASE(SIGMOID) LANES_CASE(TANH) LANES_CASE(GELU_TANH)
    }
#undef CASE
#undef LANES_CASE
}

static void line_of_two(int kind, float *to, int64_t step, const float *a, int64_t of_a, const float *b, int64_t of_b,
                        int64_t count) {
#define LINE(STEP, A, B, RESULT)                                    \
    for (int64_t i = 0; i < count; i++) {                           \
        float left = a[i * (A)], right = b[i * (B)];                \
        to[i * (STEP)] = RESULT;                                    \
    }
#define CASE(KIND, RESULT)                                                    \
    case KIND:                                                                \
        if (step == 1 && of_a == 1 && of_b == 1) LINE(1, 1, 1, RESULT)        \
        else if (step == 1 && of_a == 1 && of_b == 0) LINE(1, 1, 0, RESULT)   \
        else if (step == 1 && of_a == 0 && of_b == 1) LINE(1, 0, 1, RESULT)   \
        else LINE(step, of_a, of_b, RESULT)                                   \
        break;
    switch (kind) { /* of two numbers, one that is none wins */
        CASE(ADD, left + right) CASE(SUB, left - right) CASE(MUL, left * right) CASE(DIV, left / right)
        CASE(MAXIMUM, left > right || left != left ? left : right)
        CASE(MINIMUM, left < right || left != left ? left : right)
        CASE(GREATER, left > right)
    }
#undef CASE
#undef LINE
}

/* a b + c */
static void line_of_three(float *to, int64_t step, const float *a, int64_t of_a, const float *b, int64_t of_b,
                          const float *c, int64_t of_c, int64_t count) {
#define LINE(STEP, A, B, C) \
    for (int64_t i = 0; i < count; i++) to[i * (STEP)] = a[i * (A)] * b[i * (B)] + c[i * (C)];
    if (step == 1 && of_a == 0 && of_b == 1 && of_c == 1) LINE(1, 0, 1, 1)
    else if (step == 1 && of_a == 1 && of_b == 0 && of_c == 1) LINE(1, 1, 0, 1)
    else if (step == 1 && of_a == 1 && of_b == 1 && of_c == 1) LINE(1, 1, 1, 1)
    else LINE(step, of_a, of_b, of_c)
#undef LINE
}

/* Sums of products side by side. */
static void sums_of_products(const Op *op, float *to, const float *a, const float *b) {
    int64_t sums = op->size[2], count = op->size[3];
    const int64_t *out = op->stride[0], *of_a = op->stride[1], *of_b = op->stride[2];
    if (out[2] == 1 && of_a[2] == 1 && of_b[2] == 0) {
        for (int64_t i = 0; i < sums; i++) to[i] = a[i] * *b;
        for (int64_t k = 1; k < count; k++)
            for (int64_t i = 0; i < sums; i++) to[i] += a[k * of_a[3] + i] * b[k * of_b[3]];
        return;
    }
#define SUMS(COUNT)                                                                                             \
    for (int64_t i = 0; i < sums; i++) {                                                                        \
        float sum = 0;                                                                                          \
        for (int64_t k = 0; k < (COUNT); k++) sum += a[i * of_a[2] + k * of_a[3]] * b[i * of_b[2] + k * of_b[3]]; \
        to[i * out[2]] = sum;                                                                                   \
    }
    if (count == 4) SUMS(4) /* of most convolutions */
    else SUMS(count)
#undef SUMS
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

static void softmax(float *to, const float *from, int64_t count) {
    float top = -INFINITY;
    for (int64_t i = 0; i < count; i++) top = from[i] > top ? from[i] : top;
    for (int64_t i = 0; i < count; i++) to[i] = from[i] - top;
    for (int64_t i = 0; i < count; i++) to[i] = expf(to[i]);
    float total = sum_of(to, count);
    for (int64_t i = 0; i < count; i++) to[i] /= total;
}

/* Whether a is before b, the greatest first; what is not a number is the greatest of all. */
INLINE int is_before(float a, int64_t at, float b, int64_t other) {
    if (isnan(a) || isnan(b)) return isnan(a) && (!isnan(b) || at < other);
    return a > b || (a == b && at < other);
}

/* Where the greatest `most` numbers stand, the greatest first. */
static void find_top(int64_t *to, const float *from, int64_t count, int64_t most) {
    for (int64_t found = 0; found < most; found++) {
        int64_t best = -1, last = found ? to[found - 1] : -1;
        for (int64_t at = 0; at < count; at++)
            if ((last < 0 || is_before(from[last], last, from[at], at)) &&
                (best < 0 || is_before(from[at], at, from[best], best)))
                best = at;
        to[found] = best;
    }
}

/* `at` is where the line begins in the output and the inputs. */
static void line(const Op *op, const int64_t *at) {
    int64_t count = op->size[3];
    float *to = op->out + at[0];
    const float *a = (const float *)op->in[0] + at[1];
    switch (op->kind) {
    case MEAN: *to = sum_of(a, count) / (float)count; break;
    case SUM: *to = sum_of(a, count); break;
    case SOFTMAX: softmax(to, a, count); break;
    case TOP: find_top((int64_t *)op->out + at[0], a, count, (int64_t)op->number); break;
    case WHERE:
        for (int64_t i = 0; i < count; i++)
            to[i * op->stride[0][3]] = a[i * op->stride[1][3]] != 0
                                           ? ((const float *)op->in[1])[at[2] + i * op->stride[2][3]]
                                           : ((const float *)op->in[2])[at[3] + i * op->stride[3][3]];
        break;
    case SCATTER:
        for (int64_t i = 0; i < count; i++)
            to[((const int64_t *)op->in[1])[at[2] + i * op->stride[2][3]] * op->stride[0][3]] = *a;
        break;
    case GATHER:
        for (int64_t i = 0; i < count; i++)
            to[i * op->stride[0][3]] = a[((const int64_t *)op->in[1])[at[2] + i * op->stride[2][3]]];
        break;
    case LAYER_NORM: normalize(to, a, op->in[1], op->in[2], count, (float)op->number); break;
    case FROM_INT:
        for (int64_t i = 0; i < count; i++)
            to[i * op->stride[0][3]] = (float)((const int64_t *)op->in[0])[at[1] + i * op->stride[1][3]];
        break;
    case ADD: case SUB: case MUL: case DIV: case MAXIMUM: case MINIMUM: case GREATER:
        line_of_two((int)op->kind, to, op->stride[0][3], a, op->stride[1][3], (const float *)op->in[1] + at[2],
                    op->stride[2][3], count);
        break;
    case MUL_ADD:
        line_of_three(to, op->stride[0][3], a, op->stride[1][3], (const float *)op->in[1] + at[2], op->stride[2][3],
                      (const float *)op->in[2] + at[3], op->stride[3][3], count);
        break;
    case DOT: sums_of_products(op, to, a, (const float *)op->in[1] + at[2]); break;
    default: line_of_one((int)op->kind, to, op->stride[0][3], a, op->stride[1][3], count);
    }
}

/* Lines from one number to another. */
static void some_lines(const Op *op, int64_t from, int64_t until) {
    int64_t index[3], rest = from, at[4];
    int64_t size = op->kind == DOT ? 1 : op->size[2]; /* which has two dimensions in a line */
    index[2] = rest % size, rest /= size, index[1] = rest % op->size[1], index[0] = rest / op->size[1];
    for (int64_t number = from; number < until; number++) {
        for (int one = 0; one < 4; one++)
            at[one] = index[0] * op->stride[one][0] + index[1] * op->stride[one][1] + index[2] * op->stride[one][2];
        line(op, at);
        if (++index[2] < size) continue;
        index[2] = 0;
        if (++index[1] < op->size[1]) continue;
        index[1] = 0, index[0]++;
    }
}

static void lines(const Op *op, int threads) {
    int64_t all = op->size[0] * op->size[1] * op->size[2], count = op->kind == DOT ? all / op->size[2] : all;
    if (threads == 1 || count == 1 || all * op->size[3] < SHARED) {
        some_lines(op, 0, count);
        return;
    }
    int cpu = this_cpu();
#pragma omp parallel num_threads(threads)
    {
        keep_apart(cpu);
#pragma omp for schedule(static)
        for (int64_t part = 0; part < threads; part++)
            some_lines(op, count * part / threads, count * (part + 1) / threads);
    }
}

/* Carry out `count` operators. `scores` as in attend_rows, for the longest; `codes` and `steps` as in int8_product,
 * for the widest. */
void run_program(const Op *ops, int64_t count, const Rows *tables, float *scores, uint8_t *codes, float *steps,
                 int threads) {
    for (const Op *op = ops; op < ops + count; op++) {
        switch (op->kind) {
        case PRODUCT: multiply(op, codes, steps, threads); break;
        case ATTEND: attend(op, tables, scores, threads); break;
        case ROUTE: route(op); break;
        case PICK: pick(op); break;
        case EXPERTS: multiply_experts(op, codes, steps, threads); break;
        case COMBINE: combine(op, threads); break;
        default: lines(op, threads);
        }
    }
}
