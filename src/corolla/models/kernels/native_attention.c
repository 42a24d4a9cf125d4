/* Attention of sequences that have one new token each, over keys and values on pages.
 *
 * Invariant: as in native.c; a row's result does not depend on the rows beside it.
 */
#include "threads.h"
#include "lanes.h"
#include "native.h"

typedef struct {
    int64_t heads, kv_heads;
    int64_t dim, width;           /* of keys and of values: multiples of LANES */
    int64_t page, most;           /* tokens of a page; pages of a row in the table */
    float scale, softcap;         /* softcap: 0 for none */
    int64_t window;               /* newest tokens that are seen; 0 for all */
    const float *sinks, *slopes;  /* [heads], or NULL */
    float *beside;                /* what of each key lies elsewhere, [slots, kv_heads, extra]; NULL for nothing */
    int64_t extra;                /* a multiple of LANES */
} Attention;

/* Weights [length - begin] of one head's scores, in place; returns what they add up to. */
INLINE float weigh(const Attention *a, float *scores, int64_t begin, int64_t length, int64_t head) {
    int64_t count = length - begin;
    float top = a->sinks ? a->sinks[head] : -INFINITY;
    for (int64_t i = 0; i < count; i++) {
        if (a->slopes) scores[i] += a->slopes[head] * (float)(begin + i);
        if (a->softcap) scores[i] = a->softcap * tanhf(scores[i] / a->softcap);
        top = scores[i] > top ? scores[i] : top;
    }
    for (int64_t i = count; i % LANES; i++) scores[i] = -INFINITY;
    vf sums = {0};
    for (int64_t i = 0; i < count; i += LANES) {
        vf weights = exp_lanes(load(scores + i) - top);
        store(scores + i, weights);
        sums += weights;
    }
    float total = sum_lanes(sums);
    for (int64_t i = count; i % LANES; i++) total -= scores[i];
    return a->sinks ? total + expf(a->sinks[head] - top) : total;
}

/* Tokens of a row that follow each other in a cache [slots, kv_heads, dim]: `count` of them, `token` floats apart; and
 * where the row goes on. */
typedef struct {
    const float *data, *next;
    int64_t count, token;
} Run;

/* Where a row's token `at` has its numbers, `dim` for each head. */
INLINE const float *place_of(const Attention *a, const float *cache, const int32_t *pages, int64_t at, int64_t kv,
                             int64_t dim) {
    return cache + ((pages[at / a->page] * a->page + at % a->page) * a->kv_heads + kv) * dim;
}

/* Those from token `at` on, up to the end of its page or the row. */
INLINE Run run_from(const Attention *a, const float *cache, const int32_t *pages, int64_t at, int64_t length,
                    int64_t kv, int64_t dim) {
    int64_t left = a->page - at % a->page, more = length - at;
    const float *next = place_of(a, cache, pages, left < more ? at + left : at, kv, dim);
    return (Run){place_of(a, cache, pages, at, kv, dim), next, left < more ? left : more, a->kv_heads * dim};
}

#define AHEAD 6 /* tokens by which memory is asked before it is needed: a head's part of each is a place of its own,
                   which the CPU does not guess */

INLINE void ask_for(const float *numbers, int64_t dim) {
    for (int64_t d = 0; d < dim; d += 16) __builtin_prefetch(numbers + d);
}

INLINE void ask_ahead(Run run, int64_t i, int64_t dim) {
    int64_t at = i + AHEAD;
    ask_for(at < run.count ? run.data + at * run.token : run.next + (at - run.count) * run.token, dim);
}

/* Scores [few][room] of `count` tokens, the first of which goes to `to`; added to what is there, or in its place. */
INLINE void score(const Attention *a, Run keys, const float *query, int64_t head_stride, int64_t few, float *to,
                  int64_t room, const int64_t dim, const int add) {
    for (int64_t i = 0; i < keys.count; i++) {
        const float *key = keys.data + i * keys.token;
        ask_ahead(keys, i, dim);
        for (int64_t g = 0; g < few; g++) {
            const float *own = query + g * head_stride;
            vf sums[2] = {{0}};
            for (int64_t d = 0; d < dim; d += 2 * LANES) {
                sums[0] += load(own + d) * load(key + d);
                if (d + LANES < dim) sums[1] += load(own + d + LANES) * load(key + d + LANES);
            }
            float found = sum_lanes(sums[0] + sums[1]) * a->scale;
            to[g * room + i] = add ? to[g * room + i] + found : found;
        }
    }
}

/* out [few][width] = weights [few][room] times the values of all tokens from `begin` to `length`, of `lanes` * LANES
 * numbers of each from `own` on. Inlined with `lanes` and `few` as constants, sums stay in registers, and values are
 * read once for `few` heads. */
INLINE void mix(const Attention *a, const float *values, const int32_t *pages, int64_t begin, int64_t length,
                int64_t kv, const float *weights, int64_t room, float *out, int64_t own, const int lanes,
                const int few) {
    vf sums[4][4] = {{{0}}};
    for (int64_t at = begin; at < length;) {
        Run run = run_from(a, values, pages, at, length, kv, a->width);
        run.next += own, run.data += own;
        for (int64_t i = 0; i < run.count; i++) {
            const float *value = run.data + i * run.token;
            ask_ahead(run, i, lanes * LANES);
            for (int l = 0; l < lanes; l++)
                for (int g = 0; g < few; g++)
                    sums[g][l] += load(value + l * LANES) * weights[g * room + at - begin + i];
        }
        at += run.count;
    }
    for (int g = 0; g < few; g++)
        for (int l = 0; l < lanes; l++) store(out + g * a->width + own + l * LANES, sums[g][l]);
}

#define HEADS (REGISTERS > 16 ? 4 : 3) /* whose sums, four vectors each, fit into registers */

/* All of out [few][width]. */
INLINE void mix_heads(const Attention *a, const float *values, const int32_t *pages, int64_t begin, int64_t length,
                      int64_t kv, const float *weights, int64_t room, float *out, const int few) {
    int64_t own = 0;
    for (; own + 4 * LANES <= a->width; own += 4 * LANES)
        mix(a, values, pages, begin, length, kv, weights, room, out, own, 4, few);
    for (; own < a->width; own += LANES) mix(a, values, pages, begin, length, kv, weights, room, out, own, 1, few);
}

/* One row's `count` heads from `head` on, which share the keys of `kv`: query [count][dim], out [count][width], scores
 * [count][room]. */
INLINE void attend_group(const Attention *a, const float *keys, const float *values, const int32_t *pages,
                         int64_t length, int64_t kv, int64_t head, int64_t count, const float *query,
                         int64_t head_stride, float *out, float *scores, int64_t room) {
    int64_t dim = a->dim, width = a->width;
    int64_t begin = a->window && length > a->window ? length - a->window : 0;
    for (int64_t at = begin; at < length;) {
        Run run = run_from(a, keys, pages, at, length, kv, dim);
        float *to = scores + at - begin;
        if (dim == 64) score(a, run, query, head_stride, count, to, room, 64, 0);
        else if (dim == 128) score(a, run, query, head_stride, count, to, room, 128, 0);
        else score(a, run, query, head_stride, count, to, room, dim, 0);
        if (a->beside) {
            Run more = run_from(a, a->beside, pages, at, length, kv, a->extra);
            score(a, more, query + dim, head_stride, count, to, room, a->extra, 1);
        }
        at += run.count;
    }
    for (int64_t g = 0; g < count;) {
        float *weights = scores + g * room, *to = out + g * width;
        int64_t few = count - g < HEADS ? count - g : HEADS;
        float totals[HEADS];
        for (int64_t i = 0; i < few; i++) totals[i] = weigh(a, weights + i * room, begin, length, head + g + i);
#define MIX(FEW) mix_heads(a, values, pages, begin, length, kv, weights, room, to, FEW)
        if (few == 1) MIX(1);
        else if (few == 2) MIX(2);
        else if (few == 3) MIX(3);
        else MIX(4);
#undef MIX
        for (int64_t i = 0; i < few; i++)
            for (int64_t d = 0; d < width; d += LANES) store(to + i * width + d, load(to + i * width + d) / totals[i]);
        g += few;
    }
}

/* Tokens [heads, rows, dim] of which only dim lies together. */
typedef struct {
    const float *data;
    int64_t head, row; /* strides */
} Tokens;

/* The last token of a row, whose key or value is new, to its place on the row's pages. */
INLINE void keep(const Attention *a, float *cache, const int32_t *pages, int64_t length, int64_t kv, int64_t dim,
                 Tokens from, int64_t row) {
    int64_t at = length - 1;
    float *to = (float *)place_of(a, cache, pages, at, kv, dim);
    for (int64_t d = 0; d < dim; d += LANES) store(to + d, load(from.data + kv * from.head + row * from.row + d));
}

#define TOGETHER 8 /* heads with the same keys that one thread takes, where there are many */

/* out [rows, heads, width]: each row's query over the `lengths` tokens on its pages, int32 [rows, most] of caches
 * [slots, kv_heads, dim] for keys and [slots, kv_heads, width] for values. New keys and values, if there are any, are
 * put there first. Where `extra` numbers of a key lie in a cache of their own, `beside`, queries are dim + extra wide.
 * `scores` is [threads, heads / kv_heads, room] of scratch, room a multiple of LANES and at least the greatest
 * length. */
void attend_rows(const float *query, int64_t query_head, int64_t query_row, const float *key, int64_t key_head,
                 int64_t key_row, const float *value, int64_t value_head, int64_t value_row, const float *more,
                 int64_t more_head, int64_t more_row, float *keys, float *values, float *beside, const int32_t *pages,
                 const int64_t *lengths, int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim, int64_t width,
                 int64_t extra, int64_t page, int64_t most, float scale, float softcap, int64_t window,
                 const float *sinks, const float *slopes, float *scores, int64_t room, float *out, int threads) {
    Attention a = {heads, kv_heads, dim, width, page, most, scale, softcap, window, sinks, slopes, beside, extra};
    Tokens new_keys = {key, key_head, key_row}, new_values = {value, value_head, value_row};
    Tokens new_beside = {more, more_head, more_row};
    int64_t group = heads / kv_heads, parts = (group + TOGETHER - 1) / TOGETHER;
    int cpu = this_cpu();
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        keep_apart(cpu);
        if (key) {
#pragma omp for
            for (int64_t one = 0; one < rows * kv_heads; one++) {
                int64_t row = one / kv_heads, kv = one % kv_heads;
                const int32_t *own = pages + row * most;
                keep(&a, keys, own, lengths[row], kv, dim, new_keys, row);
                if (value) keep(&a, values, own, lengths[row], kv, width, new_values, row);
                if (more) keep(&a, beside, own, lengths[row], kv, extra, new_beside, row);
            }
        }
#pragma omp for schedule(dynamic)
        for (int64_t one = 0; one < rows * kv_heads * parts; one++) {
            int64_t row = one / parts / kv_heads, kv = one / parts % kv_heads, first = one % parts * TOGETHER;
            int64_t count = group - first < TOGETHER ? group - first : TOGETHER, head = kv * group + first;
            attend_group(&a, keys, values, pages + row * most, lengths[row], kv, head, count,
                         query + row * query_row + head * query_head, query_head, out + (row * heads + head) * width,
                         scores + thread_number() * group * room, room);
        }
    }
}
